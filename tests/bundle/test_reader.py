from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from diffkiln.bundle import Bundle, Verified, dump_manifest, open_bundle, parse_manifest
from diffkiln.bundle.reader import digest_line
from diffkiln.errors import (
    DiffkilnError,
    DigestMismatch,
    Incompatible,
    Incomplete,
    IntegrityError,
    ManifestInvalid,
    PathEscape,
    UnexpectedFile,
)
from tests.bundle.making import CONFIG, CONTENT, DOC, ENGINE, NATIVE, PROGRAM, WEIGHTS, make


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def private_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where native copies go, so that a test can see that none is left."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def verify(path: Path) -> None:
    """Open and verify, and leave nothing open, whatever happens."""
    before = descriptors()
    try:
        with open_bundle(path) as bundle, bundle.verify():
            pass
    finally:
        assert descriptors() == before


def rewrite_manifest(path: Path, data: bytes) -> None:
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_bytes(digest_line(data))


def test_gives_path_manifest_and_id(made: Path) -> None:
    with open_bundle(str(made)) as bundle:
        assert bundle.path == made
        assert bundle.manifest == parse_manifest((made / "manifest.json").read_bytes())
        assert len(bundle.id) == 64
    verify(made)


def test_progress_counts_every_hashed_byte(made: Path) -> None:
    steps: list[int] = []
    with open_bundle(made) as bundle, bundle.verify(steps.append):
        assert sum(steps) == sum(len(data) for _, data in CONTENT.values())


def test_a_bundle_may_be_moved_and_read_many_times(made: Path, tmp_path: Path) -> None:
    made.rename(tmp_path / "moved")
    for _ in range(2):
        verify(tmp_path / "moved")


# What is not a bundle


@pytest.mark.parametrize("path", ["absent", "absent/bundle", "a\0b", "/dev/null", __file__, "/", ".", "x" * 5000])
def test_what_is_not_a_bundle_is_refused_with_a_mend(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match=r"not a diffkiln bundle.*diffkiln compile -o"):
        open_bundle(path)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(IntegrityError):
        open_bundle(tmp_path / "a" / "bundle")


def test_a_root_that_is_a_link_is_refused_but_links_above_it_are_resolved(made: Path, tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(made)
    (tmp_path / "above").symlink_to(made.parent)
    for root in (tmp_path / "root", f"{tmp_path}/root/"):
        with pytest.raises(PathEscape, match="symbolic link"):
            open_bundle(root)
    with open_bundle(tmp_path / "above" / made.name) as bundle:
        assert bundle.path == made


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_missing_half_of_the_manifest_is_incomplete(made: Path, name: str) -> None:
    (made / name).unlink()
    with pytest.raises(Incomplete, match=name):
        open_bundle(made)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "hard link"])
def test_a_manifest_that_is_no_plain_file_is_refused_without_blocking(made: Path, name: str, kind: str) -> None:
    replace(made / name, kind)
    with pytest.raises(PathEscape):
        open_bundle(made)


def test_a_huge_manifest_is_refused_before_it_is_read(made: Path) -> None:
    os.truncate(made / "manifest.json", 200_000_000)
    with pytest.raises(ManifestInvalid, match="200000000 bytes"):
        open_bundle(made)


def test_an_edited_manifest_disagrees_with_its_digest(made: Path) -> None:
    manifest = made / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"Flux", b"flux"))
    with pytest.raises(DigestMismatch):
        open_bundle(made)


def test_an_edited_and_rehashed_manifest_has_another_id(made: Path) -> None:
    pinned = open_bundle(made).id
    open_bundle(made, expect_id=pinned).close()
    rewrite_manifest(made, (made / "manifest.json").read_bytes().replace(b"Flux", b"flux"))
    assert open_bundle(made).id != pinned
    with pytest.raises(DigestMismatch, match=pinned):
        open_bundle(made, expect_id=pinned)


def test_a_newer_format_is_incompatible(made: Path) -> None:
    rewrite_manifest(made, (made / "manifest.json").read_bytes().replace(b'"major":1', b'"major":2'))
    with pytest.raises(Incompatible):
        open_bundle(made)


def test_a_failed_open_leaves_no_descriptor(made: Path) -> None:
    before = descriptors()
    rewrite_manifest(made, b"[]")
    with pytest.raises(ManifestInvalid):
        open_bundle(made)
    assert descriptors() == before


# Damage


@pytest.mark.parametrize("path", CONTENT)
def test_a_flipped_bit_in_a_file_of_any_role_is_found(made: Path, path: str) -> None:
    data = bytearray((made / path).read_bytes())
    data[len(data) // 2] ^= 1
    (made / path).write_bytes(data)
    with pytest.raises(DigestMismatch, match=path):
        verify(made)


@pytest.mark.parametrize("path", CONTENT)
def test_a_file_cut_anywhere_is_found(made: Path, path: str) -> None:
    size = (made / path).stat().st_size
    for length in {0, size - 1, *range(0, size, 4096)} - {size}:
        os.truncate(made / path, length)
        with pytest.raises(DigestMismatch, match=path):
            verify(made)


def test_a_file_that_has_grown_is_found(made: Path) -> None:
    with (made / WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DigestMismatch, match=WEIGHTS):
        verify(made)


@pytest.mark.parametrize("path", CONTENT)
def test_a_missing_file_is_incomplete(made: Path, path: str) -> None:
    (made / path).unlink()
    with pytest.raises(Incomplete, match=path):
        verify(made)


def test_a_missing_directory_is_incomplete(made: Path) -> None:
    shutil.rmtree(made / "engines")
    with pytest.raises(Incomplete, match=NATIVE):
        verify(made)


@pytest.mark.parametrize(
    "path", ["x", ".git/x.so", "engines/x.so", "weights/transformer/build.json", "docs/README.md", "x\udcff", "\x1b[2J"]
)
def test_an_extra_file_is_unexpected(made: Path, path: str) -> None:
    (made / path).parent.mkdir(exist_ok=True)
    (made / path).touch()
    with pytest.raises(UnexpectedFile) as caught:
        verify(made)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["x", "programs/empty", "engines/cpu/x"])
def test_an_extra_empty_directory_is_unexpected(made: Path, path: str) -> None:
    (made / path).mkdir()
    with pytest.raises(UnexpectedFile, match=path):
        verify(made)


def test_an_extra_fifo_is_refused_without_blocking(made: Path) -> None:
    os.mkfifo(made / "x")
    with pytest.raises(UnexpectedFile, match="a FIFO"):
        verify(made)


def test_files_outside_the_id_may_be_there_or_not(made: Path) -> None:
    (made / "README.md").write_text("# Hello")
    verify(made)
    (made / "README.md").unlink()
    (made / "build.json").unlink()
    verify(made)
    (made / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(PathEscape):
        verify(made)


def replace(path: Path, kind: str) -> None:
    """Put something that is not a plain file in the place of one."""
    aside = Path(os.environ["XDG_STATE_HOME"]).parent / "aside"
    if kind == "hard link":
        os.link(path, aside)
        return
    path.rename(aside)
    if kind == "link":
        path.symlink_to(aside)
    elif kind == "relative link":
        shutil.copy(aside, path.with_name("other"))
        path.symlink_to("other")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may only be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    elif kind == "device":
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero: endless
    elif kind == "directory":
        path.mkdir()


@pytest.mark.parametrize("path", [CONFIG, WEIGHTS, NATIVE])
@pytest.mark.parametrize(
    "kind", ["link", "relative link", "dangling link", "fifo", "socket", "device", "directory", "hard link"]
)
def test_what_is_no_plain_file_is_refused_without_blocking(made: Path, path: str, kind: str) -> None:
    try:
        replace(made / path, kind)
    except PermissionError:
        pytest.skip("making a device needs root")
    with pytest.raises((PathEscape, UnexpectedFile) if kind in {"directory", "relative link"} else PathEscape):
        verify(made)


@pytest.mark.parametrize("path", ["engines", "engines/cpu/transformer", "weights/transformer"])
def test_a_directory_that_is_a_link_or_a_file_is_refused(made: Path, path: str, tmp_path: Path) -> None:
    (made / path).rename(tmp_path / "aside")
    (made / path).symlink_to(tmp_path / "aside")
    with pytest.raises(PathEscape, match=path):
        verify(made)
    (made / path).unlink()
    (made / path).touch()
    with pytest.raises(PathEscape, match=path):
        verify(made)


def test_a_file_that_cannot_be_read_is_said_in_our_words(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root reads everything, so the errno of a failing disk is put in.
    def pread(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with open_bundle(made) as bundle:
        monkeypatch.setattr(os, "pread", pread)
        with pytest.raises(IntegrityError, match="cannot be read: Input/output error"):
            bundle.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_a_progress_that_raises_is_not_blamed_on_the_bundle_and_leaves_nothing_open(
    made: Path, error: type[BaseException]
) -> None:
    def progress(_: int) -> None:
        raise error

    with open_bundle(made) as bundle:
        before = descriptors()
        with pytest.raises(error):
            bundle.verify(progress)
        assert descriptors() == before


# What a verified bundle hands out


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


# Names in the manifest


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "C:\\x", "a\\..\\b", "a\0b", "x" * 300])
def test_a_manifest_that_names_a_path_outside_opens_nothing(
    made: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((made / "manifest.json").read_bytes())
    raw["files"][0]["path"] = path
    rewrite_manifest(made, json.dumps(raw).encode())
    opened: list[object] = []
    real = os.open

    def spy(name: object, *args: int, **more: int) -> int:
        opened.append(name)
        return real(name, *args, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(PathEscape):
        open_bundle(made)
    assert set(opened) == {made, ".", "manifest.json", "manifest.sha256"}


def test_names_equal_after_folding_are_refused(made: Path) -> None:
    raw = json.loads((made / "manifest.json").read_bytes())
    raw["files"].append(raw["files"][0] | {"path": raw["files"][0]["path"].upper()})
    rewrite_manifest(made, json.dumps(raw).encode())
    with pytest.raises(PathEscape, match="same name"):
        open_bundle(made)


def test_any_spelling_of_the_json_has_its_own_id(made: Path) -> None:
    """The id is of the bytes; only the writer must be canonical."""
    identity = open_bundle(made).id
    data = (made / "manifest.json").read_bytes()
    rewrite_manifest(made, json.dumps(json.loads(data), indent=1).encode())
    with open_bundle(made) as bundle:
        assert bundle.id != identity
        assert dump_manifest(bundle.manifest) == data


def test_a_replaced_bundle_stays_readable_for_who_holds_it(made: Path, verified: Verified) -> None:
    make(made, b"new", force=True)
    assert verified.pread(WEIGHTS, 16) == CONTENT[WEIGHTS][1][:16]
