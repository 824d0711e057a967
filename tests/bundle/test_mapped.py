"""Copies of weights that processes share: who may have written them, and what is done about the rest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from diffkiln.bundle import mapped as module
from diffkiln.bundle.cleaning import free, freeable
from diffkiln.bundle.mapped import mapped

DATA = os.urandom(10_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
HEADER = 136


class Writer:
    """Writes the copy, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path, pad: int) -> None:
        self.count += 1
        path.write_bytes(bytes(pad) + DATA)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "cache" / "weights"


def asked(write: Writer) -> memoryview | None:
    return mapped(DIGEST, len(DATA), HEADER, write)


def test_a_copy_is_written_once_is_private_and_stays_as_it_is(home, monkeypatch):
    write = Writer()
    first = asked(write)
    assert bytes(first) == DATA
    monkeypatch.setattr(module, "chunks", None)  # the receipt vouches, nothing is hashed
    second = asked(write)
    assert write.count == 1
    (copy,) = home.iterdir()
    assert (copy.stat().st_mode & 0o777, home.stat().st_mode & 0o777) == (0o400, 0o700)
    second[:4] = b"mine"
    assert bytes(first) == bytes(asked(write)) == DATA
    assert copy.read_bytes().endswith(DATA)


def test_tensors_begin_at_a_page(home):
    import numpy as np

    made = np.frombuffer(asked(Writer()), np.uint8)[HEADER:]
    assert made.ctypes.data % 4096 == 0


def test_a_copy_that_its_receipt_does_not_know_is_hashed(home):
    write = Writer()
    asked(write)
    (copy,) = home.iterdir()
    os.utime(copy)
    assert bytes(asked(write)) == DATA
    assert write.count == 1


def _write_other_bytes(copy: Path, _other: Path) -> None:
    copy.chmod(0o600)
    copy.write_bytes(bytes(copy.stat().st_size))
    copy.chmod(0o400)


def _cut(copy: Path, _other: Path) -> None:
    copy.chmod(0o600)
    os.truncate(copy, 100)
    copy.chmod(0o400)


def _let_itself_be_written(copy: Path, _other: Path) -> None:
    copy.chmod(0o600)


def _name_again(copy: Path, other: Path) -> None:
    os.link(copy, other)


@pytest.mark.parametrize("spoil", [_write_other_bytes, _cut, _let_itself_be_written, _name_again])
def test_a_copy_that_is_not_what_was_written_is_made_anew(home, tmp_path, spoil, caplog):
    write = Writer()
    asked(write)
    (copy,) = home.iterdir()
    spoil(copy, tmp_path / "other")
    assert bytes(asked(write)) == DATA
    assert write.count == 2
    assert "is made anew" in caplog.text


def test_a_link_in_the_place_of_a_copy_is_not_followed(home, tmp_path, caplog):
    asked(Writer())
    (copy,) = home.iterdir()
    copy.rename(tmp_path / "other")
    copy.symlink_to(tmp_path / "other")
    assert asked(Writer()) is None
    assert "weights are not shared" in caplog.text


def test_where_others_may_write_nothing_is_shared(home, caplog):
    home.mkdir(parents=True)
    home.chmod(0o777)
    write = Writer()
    assert asked(write) is None
    assert write.count == 0
    assert "weights are not shared with other processes" in caplog.text


def test_a_disk_without_room_leaves_nothing_behind(home, caplog):
    def write(path: Path, _pad: int) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    assert asked(write) is None
    assert list(home.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_copies_can_be_freed_while_they_are_in_use(home):
    view = asked(Writer())
    (item,) = freeable(["weights"])
    assert free(item) == ""
    assert bytes(view) == DATA
    assert not home.exists()
