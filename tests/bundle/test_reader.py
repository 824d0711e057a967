from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from diffkiln.bundle import dump_manifest, open_bundle, parse_manifest
from diffkiln.bundle.reader import digest_line
from diffkiln.errors import (
    DigestMismatch,
    Incompatible,
    Incomplete,
    IntegrityError,
    ManifestInvalid,
    PathEscape,
    UnexpectedFile,
)
from tests.bundle.making import CONFIG, CONTENT, NATIVE, WEIGHTS, descriptors

pytestmark = pytest.mark.usefixtures("private_tmp")


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
