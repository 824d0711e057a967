from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import pytest

from diffkiln.bundle import Readers, hashed, open_bundle
from diffkiln.errors import DigestMismatch
from tests.bundle.making import CONTENT, NATIVE, PROGRAM, WEIGHTS, make

SIZE = sum(len(data) for _, data in CONTENT.values())
WEIGHT = len(CONTENT[WEIGHTS][1])


@pytest.fixture
def settled(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that has been left alone for long enough: a thousandth of a second is, here."""
    monkeypatch.setattr(hashed, "SETTLED_NS", 1_000_000)
    wait()
    return made


def wait() -> None:
    time.sleep(0.02)  # several ticks of the file system's clock


def load(path: Path, receipt: str = "use") -> int:
    """What was hashed on the way."""
    steps: list[int] = []
    with open_bundle(path) as bundle, bundle.verify(steps.append, receipt=receipt) as verified:  # pyright: ignore[reportArgumentType]
        assert verified.pread(WEIGHTS, WEIGHT) == (path / WEIGHTS).read_bytes()
    return sum(steps)


def receipts(state_home: Path) -> list[Path]:
    return sorted((state_home / "diffkiln" / "hashed").glob("*"))


def test_a_second_load_hashes_no_weights_unless_it_is_asked_to(settled: Path, state_home: Path) -> None:
    assert load(settled) == SIZE
    (receipt,) = receipts(state_home)
    assert receipt.stat().st_mode & 0o777 == 0o600
    assert receipt.parent.stat().st_mode & 0o777 == 0o700
    assert load(settled) == SIZE - WEIGHT
    assert load(settled, "renew") == SIZE
    assert load(settled, "ignore") == SIZE
    assert load(settled) == SIZE - WEIGHT


def test_a_verification_that_is_not_a_load_leaves_no_receipt(settled: Path, state_home: Path) -> None:
    load(settled, "ignore")
    assert receipts(state_home) == []


def test_files_that_were_only_just_written_are_hashed_again(made: Path) -> None:
    """Another write within the same tick of the clock would show in nothing."""
    assert load(made) == SIZE
    assert load(made) == SIZE


def test_a_bundle_elsewhere_or_another_one_here_is_hashed(settled: Path) -> None:
    load(settled)
    moved = settled.rename(settled.with_name("moved"))
    assert load(moved) == SIZE
    moved.rename(settled)
    wait()
    assert load(settled) == SIZE - WEIGHT
    make(settled, extra=b"more", force=True)
    assert load(settled) == SIZE + 4


def test_touched_weights_are_hashed_again_and_what_was_changed_is_found(settled: Path) -> None:
    path = settled / WEIGHTS
    load(settled)
    for touch in (
        lambda: os.utime(path),
        lambda: path.chmod(0o600),
        lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda: os.replace(_copy(path), path),
    ):
        touch()
        wait()
        assert load(settled) == SIZE
        assert load(settled) == SIZE - WEIGHT


def _copy(path: Path) -> Path:
    """The same bytes and times in another file."""
    copy = path.parents[3] / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    return copy


def test_a_flipped_bit_is_found_though_its_time_was_set_back(settled: Path) -> None:
    load(settled)
    path = settled / WEIGHTS
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    with open_bundle(settled) as bundle, pytest.raises(DigestMismatch, match=WEIGHTS):
        bundle.verify(receipt="use")


@pytest.mark.parametrize("path", [path for path, (role, _) in CONTENT.items() if role != "weights"])
def test_all_but_weights_is_hashed_at_every_load(settled: Path, path: str) -> None:
    load(settled)
    file = settled / path
    status = file.stat()
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open_bundle(settled) as bundle, pytest.raises(DigestMismatch, match=path):
        bundle.verify(receipt="use")


def test_native_code_is_hashed_in_its_copy_whatever_was_hashed_before(settled: Path) -> None:
    load(settled)
    with open_bundle(settled) as bundle, bundle.verify(receipt="use") as verified:
        data = (settled / NATIVE).read_bytes()
        (settled / NATIVE).write_bytes(b"\x7fEVIL" + data[5:])
        with pytest.raises(DigestMismatch, match=NATIVE):
            verified.native_copy(NATIVE.rpartition("/")[0])


def test_weights_changed_or_cut_after_a_load_without_hashing_are_found(settled: Path) -> None:
    for spoil in (lambda path: os.truncate(path, 100), lambda path: path.write_bytes(bytes(WEIGHT))):
        load(settled)
        good = (settled / WEIGHTS).read_bytes()
        with open_bundle(settled) as bundle, bundle.verify(receipt="use") as verified:
            spoil(settled / WEIGHTS)
            with pytest.raises(DigestMismatch, match=WEIGHTS):
                verified.pread(WEIGHTS, WEIGHT)
        (settled / WEIGHTS).write_bytes(good)
        wait()


def test_weights_swapped_after_a_load_without_hashing_are_not_looked_at(settled: Path) -> None:
    load(settled)
    with open_bundle(settled) as bundle, bundle.verify(receipt="use") as verified:
        (settled / WEIGHTS).rename(settled.with_name("aside"))
        (settled / WEIGHTS).write_bytes(bytes(WEIGHT))
        assert verified.pread(WEIGHTS, WEIGHT) == CONTENT[WEIGHTS][1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"files": 1}',
        b'{"files": {"x": [1, 2]}}',
        b'{"files": {"x": [1, 2, 3, 4, true]}}',
        b"\xff",
    ],
)
def test_a_broken_receipt_is_no_receipt(settled: Path, state_home: Path, data: bytes) -> None:
    load(settled)
    (receipt,) = receipts(state_home)
    receipt.write_bytes(data)
    assert load(settled) == SIZE
    assert WEIGHTS in json.loads(receipt.read_bytes())["files"]
    assert load(settled) == SIZE - WEIGHT


def test_a_receipt_that_others_could_have_written_is_no_receipt(
    settled: Path, state_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(settled)
    (receipt,) = receipts(state_home)
    receipt.parent.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert load(settled) == SIZE
    assert "chmod 700" in caplog.text
    receipt.parent.chmod(0o700)
    receipt.rename(receipt.with_name("aside"))
    receipt.symlink_to("aside")
    assert load(settled) == SIZE


def test_a_state_directory_that_cannot_be_written_only_costs_time(
    settled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with caplog.at_level(logging.INFO):
        assert load(settled) == load(settled) == SIZE
    assert "the next load" in caplog.text


def test_weights_that_are_hashed_after_the_verification_are_noted_too(settled: Path) -> None:
    steps: list[int] = []
    with open_bundle(settled) as bundle, bundle.verify(steps.append, {"program"}, "use") as verified:
        verified.read_into(WEIGHTS, bytearray(WEIGHT), 0, steps.append)
        verified.hash_rest(Readers(steps.append))
        assert sum(steps) == WEIGHT + len(CONTENT[PROGRAM][1])
    assert load(settled) == SIZE - WEIGHT


def test_what_nobody_reads_is_hashed_all_the_same(settled: Path) -> None:
    (settled / WEIGHTS).write_bytes(bytes(WEIGHT))
    with (
        open_bundle(settled) as bundle,
        bundle.verify(roles={"program"}, receipt="use") as verified,
        pytest.raises(DigestMismatch, match=WEIGHTS),
    ):
        verified.hash_rest(Readers())
    with open_bundle(settled) as bundle, pytest.raises(DigestMismatch, match=WEIGHTS):
        bundle.verify(receipt="use")


def test_a_failed_verification_leaves_no_receipt(settled: Path, state_home: Path) -> None:
    (settled / NATIVE).write_bytes(b"x" * len(CONTENT[NATIVE][1]))
    with open_bundle(settled) as bundle, pytest.raises(DigestMismatch):
        bundle.verify(receipt="use")
    assert receipts(state_home) == []
