"""What a verified bundle hands out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffkiln.bundle import Bundle, Verified, open_bundle
from diffkiln.errors import (
    DiffkilnError,
    DigestMismatch,
    Incomplete,
    IntegrityError,
    PathEscape,
)
from tests.bundle.making import CONFIG, CONTENT, DOC, ENGINE, NATIVE, PROGRAM, WEIGHTS, descriptors, make

pytestmark = pytest.mark.usefixtures("private_tmp")


@pytest.fixture
def bundle(made: Path) -> Bundle:
    return open_bundle(made)


@pytest.fixture
def verified(bundle: Bundle) -> Verified:
    return bundle.verify()


def put(path: Path, data: bytes) -> None:
    """Another file by the same name."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.rename(path)


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("path", [CONFIG, PROGRAM, DOC, WEIGHTS])
def test_read_gives_the_bytes(verified: Verified, path: str) -> None:
    assert verified.read(path) == CONTENT[path][1]


@pytest.mark.parametrize("path", [CONFIG, PROGRAM, DOC])
def test_read_hashes_again(verified: Verified, made: Path, path: str) -> None:
    for data in (flipped(CONTENT[path][1]), CONTENT[path][1][:-1], CONTENT[path][1] + b"x"):
        put(made / path, data)
        with pytest.raises(DigestMismatch, match=path):
            verified.read(path)
    (made / path).unlink()
    (made / path).symlink_to("/etc/passwd")
    with pytest.raises(PathEscape):
        verified.read(path)
    (made / path).unlink()
    with pytest.raises(Incomplete):
        verified.read(path)


def test_roles_are_kept_apart(verified: Verified) -> None:
    with pytest.raises(IntegrityError, match="native"):
        verified.read(NATIVE)
    for path in (NATIVE, CONFIG):
        with pytest.raises(IntegrityError, match="not weights"):
            verified.descriptor(path)
    for call in (verified.read, verified.descriptor, verified.native_copy):
        with pytest.raises(Incomplete):
            call("absent")
    with pytest.raises(Incomplete, match="no native file"):
        verified.native_copy("programs")
    with pytest.raises(PathEscape):
        verified.native_copy("../../etc")


def test_weights_are_read_from_the_file_that_was_hashed(verified: Verified, made: Path) -> None:
    data = CONTENT[WEIGHTS][1]
    put(made / WEIGHTS, flipped(data))
    assert verified.size(WEIGHTS) == len(data)
    assert verified.pread(WEIGHTS, 100, 50) == data[50:150]
    assert os.pread(verified.descriptor(WEIGHTS), len(data), 0) == data
    buffer = bytearray(len(data))
    verified.read_into(WEIGHTS, buffer)
    assert buffer == data
    shutil.rmtree(made)
    assert verified.pread(WEIGHTS, 100, 50) == data[50:150]


def test_weights_cut_while_in_use_give_an_error(verified: Verified, made: Path) -> None:
    os.truncate(made / WEIGHTS, 4096)
    with pytest.raises(DigestMismatch, match="cut short"):
        verified.pread(WEIGHTS, 8192)
    with pytest.raises(DigestMismatch, match="written to"):
        verified.pread(WEIGHTS, 100)


def test_weights_written_to_while_in_use_give_an_error(verified: Verified, made: Path) -> None:
    with (made / WEIGHTS).open("r+b") as file:
        file.write(b"xxxx")
    os.utime(made / WEIGHTS, ns=(0, 0))
    with pytest.raises(DigestMismatch, match="written to"):
        verified.pread(WEIGHTS, 100)


def test_what_verify_left_out_is_hashed_when_it_is_asked_for(made: Path, bundle: Bundle) -> None:
    for path in (WEIGHTS, NATIVE, CONFIG):
        (made / path).write_bytes(flipped(CONTENT[path][1]))
    steps: list[int] = []
    with bundle.verify(steps.append, roles={"program", "doc"}) as verified:
        assert sum(steps) == len(CONTENT[PROGRAM][1]) + len(CONTENT[DOC][1])
        with pytest.raises(DigestMismatch):
            verified.descriptor(WEIGHTS)
        with pytest.raises(DigestMismatch):
            verified.native_copy(ENGINE)
        with pytest.raises(DigestMismatch):
            verified.read(CONFIG)


HEAD = 100


def unhashed(bundle: Bundle) -> Verified:
    return bundle.verify(roles={"program", "doc"})


def test_weights_that_are_read_to_their_end_are_hashed_in_the_buffer_that_is_used(made: Path, bundle: Bundle) -> None:
    data = CONTENT[WEIGHTS][1]
    steps: list[int] = []
    with unhashed(bundle) as verified:
        buffer = bytearray(len(data) - HEAD)
        verified.read_into(WEIGHTS, buffer, HEAD, steps.append)
        assert buffer == data[HEAD:]
        assert sum(steps) == len(data)
        assert verified.is_hashed(WEIGHTS)


@pytest.mark.parametrize("place", [0, HEAD - 1, HEAD, -1], ids=["first", "before", "begin", "last"])
def test_a_flipped_bit_is_found_where_weights_are_hashed_as_they_are_read(
    made: Path, bundle: Bundle, place: int
) -> None:
    data = bytearray(CONTENT[WEIGHTS][1])
    data[place] ^= 1
    (made / WEIGHTS).write_bytes(data)
    with unhashed(bundle) as verified:
        with pytest.raises(DigestMismatch, match=WEIGHTS):
            verified.read_into(WEIGHTS, bytearray(len(data) - HEAD), HEAD)
        assert not verified.is_hashed(WEIGHTS)


def test_a_part_of_weights_is_handed_out_only_after_the_whole_was_hashed(made: Path, bundle: Bundle) -> None:
    (made / WEIGHTS).write_bytes(CONTENT[WEIGHTS][1][:-1] + b"x")
    with unhashed(bundle) as verified, pytest.raises(DigestMismatch):
        verified.read_into(WEIGHTS, bytearray(10), HEAD)


def test_weights_cut_or_written_to_while_they_are_hashed_give_an_error(made: Path, bundle: Bundle) -> None:
    size = len(CONTENT[WEIGHTS][1])

    def write(_: int) -> None:
        (made / WEIGHTS).write_bytes(CONTENT[WEIGHTS][1])

    with unhashed(bundle) as verified:
        with pytest.raises(DigestMismatch, match="written to"):
            verified.read_into(WEIGHTS, bytearray(size), 0, write)
        os.truncate(made / WEIGHTS, HEAD)
        with pytest.raises(DigestMismatch, match="cut short"):
            verified.read_into(WEIGHTS, bytearray(size), 0)


def test_a_look_at_weights_hashes_nothing_and_finds_what_was_written(made: Path, bundle: Bundle) -> None:
    with unhashed(bundle) as verified:
        assert verified.peek(WEIGHTS, 8, 4) == CONTENT[WEIGHTS][1][4:12]
        assert not verified.is_hashed(WEIGHTS)
        with pytest.raises(IntegrityError, match="not weights"):
            verified.peek(NATIVE, 8)
        (made / WEIGHTS).write_bytes(CONTENT[WEIGHTS][1])
        with pytest.raises(DigestMismatch, match="written to"):
            verified.peek(WEIGHTS, 8)


def test_native_files_are_copied_into_a_private_directory(verified: Verified, private_tmp: Path) -> None:
    copy = verified.native_copy(ENGINE)
    assert copy.stat().st_mode & 0o777 == 0o700
    files = {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    assert files == {"model.so": CONTENT[NATIVE][1], "inner/kernel.cubin": b"cubin" * 100}
    assert verified.native_copy(ENGINE) == copy
    assert verified.native_copy(f"{ENGINE}/inner") != copy
    verified.close()
    assert list(private_tmp.iterdir()) == []


@pytest.mark.parametrize("change", [flipped, lambda data: data[:-1], lambda data: data + b"x"])
def test_a_native_file_swapped_after_hashing_is_not_handed_out(
    verified: Verified, made: Path, private_tmp: Path, change: Callable[[bytes], bytes]
) -> None:
    put(made / NATIVE, change(CONTENT[NATIVE][1]))
    with pytest.raises(DigestMismatch, match=NATIVE):
        verified.native_copy(ENGINE)
    assert not list(private_tmp.rglob("*.so"))
    verified.close()
    assert list(private_tmp.iterdir()) == []


def test_no_room_for_the_native_copy_names_the_bytes(verified: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(DiffkilnError, match=r"5504 bytes.*Set TMPDIR"):
        verified.native_copy(ENGINE)


def test_closing_gives_everything_back_and_may_be_done_twice(made: Path, private_tmp: Path) -> None:
    before = descriptors()
    opened = open_bundle(made)
    verified = opened.verify()
    opened.close()
    verified.native_copy(ENGINE)
    verified.close()
    verified.close()
    opened.close()
    assert descriptors() == before
    assert list(private_tmp.iterdir()) == []
    for call in (verified.read, verified.descriptor, verified.native_copy):
        with pytest.raises(ValueError, match="closed"):
            call(CONFIG)
    with pytest.raises(ValueError, match="closed"):
        opened.verify()


def test_forgetting_to_close_gives_everything_back_too(made: Path, private_tmp: Path) -> None:
    before = descriptors()
    open_bundle(made).verify().native_copy(ENGINE)
    assert descriptors() == before
    assert list(private_tmp.iterdir()) == []


def test_a_forked_child_leaves_its_parents_copy_alone(verified: Verified) -> None:
    copy = verified.native_copy(ENGINE)
    if (child := os.fork()) == 0:
        verified.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (copy / "model.so").exists()


def test_many_processes_may_read_at_once(made: Path) -> None:
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            status = 1
            try:
                with open_bundle(made) as bundle, bundle.verify() as verified:
                    verified.native_copy(ENGINE)
                    status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8


def test_a_replaced_bundle_stays_readable_for_who_holds_it(made: Path, verified: Verified) -> None:
    make(made, b"new", force=True)
    assert verified.pread(WEIGHTS, 16) == CONTENT[WEIGHTS][1][:16]


def overwritten(path: Path, data: bytes) -> None:
    """The bytes of the file changed in place, and its time set back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


def test_weights_overwritten_in_use_with_their_time_set_back_give_an_error(verified: Verified, made: Path) -> None:
    overwritten(made / WEIGHTS, b"xxxx")
    with pytest.raises(DigestMismatch, match="not the file that the manifest names"):
        verified.pread(WEIGHTS, 100)


def test_weights_overwritten_between_reading_and_looking_are_not_handed_out(
    verified: Verified, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of the wrong bytes is read anew, though the right ones are back when the file is hashed."""
    data, read = CONTENT[WEIGHTS][1], os.preadv
    overwritten(made / WEIGHTS, flipped(data))

    def preadv(*arguments: object) -> int:
        count = read(*arguments)  # pyright: ignore[reportArgumentType]
        overwritten(made / WEIGHTS, data)
        monkeypatch.setattr(os, "preadv", read)
        return count

    verified.descriptor(WEIGHTS)
    monkeypatch.setattr(os, "preadv", preadv)
    assert verified.pread(WEIGHTS, len(data)) == data


def test_weights_that_never_come_to_rest_give_an_error(
    verified: Verified, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def preadv(*arguments: object) -> int:
        overwritten(made / WEIGHTS, CONTENT[WEIGHTS][1])
        return read(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(DigestMismatch, match="keeps changing"):
        verified.pread(WEIGHTS, 100)


def test_a_link_a_mode_and_a_removal_are_no_writes(verified: Verified, made: Path) -> None:
    """Each changes ctime, as a write does; the bytes are hashed once for each, and no more."""
    data = CONTENT[WEIGHTS][1]
    changes: list[Callable[[], object]] = [
        lambda: os.link(made / WEIGHTS, made.parent / "second"),
        lambda: (made / WEIGHTS).chmod(0o600),
        lambda: (made / WEIGHTS).rename(made / "elsewhere"),
        lambda: (made / "elsewhere").unlink(),
    ]
    for change in changes:
        change()
        assert verified.pread(WEIGHTS, len(data)) == data
        assert verified._is_untouched(WEIGHTS)
