from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffkiln.bundle import BundleWriter, open_bundle, parse_manifest, staging, writer
from diffkiln.errors import BuildError, PathEscape, SpecError
from tests.bundle.making import CONTENT, DOC, WEIGHTS, fill, left_beside, make, manifest_of


def failing(number: int, after: int = 0):
    """Something that fails with this errno from its call number `after` on."""
    calls = iter(range(10_000))

    def fail(*_: object, **__: object) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))

    return fail


def test_publishes_a_whole_bundle_and_gives_its_id(output: Path) -> None:
    identity = make(output)
    with open_bundle(output) as bundle, bundle.verify():
        assert bundle.id == identity
        assert [row.path for row in bundle.manifest.files] == sorted(CONTENT)
    assert left_beside(output) == []
    line = (output / "manifest.sha256").read_text()
    assert line == f"{identity}  manifest.json\n"
    assert subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=output, capture_output=True).returncode == 0


def test_same_files_give_the_same_id_wherever_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert make(tmp_path / "one") == make(tmp_path / "other" / "two")
    assert make(tmp_path / "three", extra=b"!") != make(tmp_path / "one", force=True)


def test_the_bundle_has_the_users_usual_permissions(made: Path) -> None:
    beside = made.parent / "beside"
    beside.mkdir()
    assert made.stat().st_mode == beside.stat().st_mode


def test_the_staging_is_private_while_it_is_filled(output: Path) -> None:
    with BundleWriter(output) as bundle:
        bundle.write(DOC, b"x", "doc")
        (name,) = left_beside(output)
        assert stat.S_IMODE((output.parent / name).stat().st_mode) == 0o700
        assert not output.exists()


def test_an_existing_output_is_refused_early_without_force(made: Path) -> None:
    with pytest.raises(SpecError, match="pass --force") as caught, BundleWriter(made):
        pytest.fail("entered")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["directory", "file", "link", "empty"])
def test_force_replaces_nothing_but_a_bundle(output: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        output.write_text("precious")
    elif kind == "link":
        make(tmp_path / "real")
        output.symlink_to(tmp_path / "real")
    else:
        output.mkdir()
        if kind == "directory":
            (output / "manifest.json").write_text("[" * 5000)
    with pytest.raises(SpecError, match="not a diffkiln bundle"), BundleWriter(output, force=True):
        pytest.fail("entered")
    assert os.path.lexists(output)


def test_force_replaces_a_bundle_at_publish_and_not_before(made: Path) -> None:
    old = (made / "manifest.json").read_bytes()
    with BundleWriter(made, force=True) as bundle:
        fill(bundle, b"new")
        assert (made / "manifest.json").read_bytes() == old
        bundle.publish(manifest_of)
    assert (made / DOC).read_bytes() == b"read menew"
    assert left_beside(made) == []


def test_force_works_where_names_cannot_be_exchanged(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkiln.bundle.rename._renameat2", lambda *_: False)
    identity = make(made, b"new", force=True)
    assert open_bundle(made).id == identity
    assert left_beside(made) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_rename_leaves_the_old_bundle(made: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    old = open_bundle(made).id
    if not exchange:
        monkeypatch.setattr("diffkiln.bundle.rename._renameat2", lambda *_: False)
    monkeypatch.setattr(staging, "exchange" if exchange else "rename_new", failing(errno.EIO))
    with pytest.raises(BuildError, match="cannot publish"):
        make(made, b"new", force=True)
    assert open_bundle(made).id == old
    assert left_beside(made) == []


@pytest.mark.parametrize("old", [True, False])
def test_any_failed_fsync_leaves_nothing_published(output: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    identity = make(output) if old else None
    step = 0
    for step in range(100):
        calls = iter(range(1000))

        def fsync(descriptor: int, step: int = step, calls: Iterator[int] = calls) -> None:
            if next(calls) == step:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            make(output, b"new", force=True)
        except BuildError as error:
            assert "Input/output error" in str(error)  # noqa: PT017
        else:
            break
        assert output.exists() == old
        assert not old or open_bundle(output).id == identity
        assert left_beside(output) == []
    # every file, those three that are not hashed, every directory, and the parent
    assert step == len(CONTENT) + 3 + 12


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_leaving_by_an_exception_leaves_no_trace(made: Path, error: type[BaseException]) -> None:
    old = open_bundle(made).id
    with pytest.raises(error), BundleWriter(made, force=True) as bundle:  # noqa: PT012
        fill(bundle)
        raise error
    assert open_bundle(made).id == old
    assert left_beside(made) == []


def test_leaving_without_publish_leaves_no_trace(output: Path) -> None:
    with BundleWriter(output) as bundle:
        fill(bundle)
    assert not output.exists()
    assert left_beside(output) == []


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not there"), BundleWriter(tmp_path / "a" / "b"):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["/", "..", "a\0b"])
def test_an_output_without_a_usable_name_is_refused(output: str) -> None:
    with pytest.raises(SpecError), BundleWriter(output, force=True):
        pytest.fail("entered")


def test_a_parent_that_denies_writing_is_refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bite root, so the answer of access(2) is put in.
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(BuildError, match="cannot be written to"), BundleWriter(output):
        pytest.fail("entered")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    point = tmp_path / "mounted"
    point.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(point)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mount does not work here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_read_only_file_system_is_refused_before_any_work(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(BuildError, match="cannot be written to"), BundleWriter(mounted / "bundle"):
        pytest.fail("entered")


@pytest.mark.parametrize("own_write", [False, True], ids=["write", "path"])
def test_a_full_disk_names_the_bytes_and_leaves_the_old_bundle(mounted: Path, own_write: bool) -> None:
    output = mounted / "bundle"
    old = make(output)

    def write() -> None:
        with BundleWriter(output, force=True) as bundle:
            if own_write:
                bundle.path(WEIGHTS).write_bytes(bytes(5_000_000))
            else:
                bundle.write("programs/big.json", bytes(5_000_000), "program")

    with pytest.raises(BuildError, match=r"No space left.*bytes.*are needed.*bytes are free in") as caught:
        write()
    assert own_write or "5000000" in str(caught.value)
    assert open_bundle(output).id == old
    assert left_beside(output) == []


def test_space_can_be_asked_for_ahead(mounted: Path) -> None:
    with BundleWriter(mounted / "bundle") as bundle:
        bundle.require_space(1_000_000)
        with pytest.raises(BuildError, match="5000000 bytes are needed"):
            bundle.require_space(5_000_000)


def test_another_os_error_names_the_path_and_the_reason(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BundleWriter(output) as bundle:
        bundle.write("engines/a/b/c", b"", "native")
        with pytest.raises(BuildError, match=r"a/b: File exists"):
            bundle.write("engines/a/b", b"", "native")
    monkeypatch.setattr(writer, "sync_tree", failing(errno.EDQUOT))
    with pytest.raises(BuildError, match=r"Disk quota exceeded.*bytes are free"):
        make(output)
    assert left_beside(output) == []


def test_an_os_error_from_elsewhere_is_not_called_ours(output: Path) -> None:
    with pytest.raises(FileNotFoundError), BundleWriter(output):
        Path("/nowhere/at/all").read_bytes()


def test_a_path_that_escapes_is_refused(output: Path) -> None:
    with BundleWriter(output) as bundle:
        for rel in ("../x", "/x", "a\\..\\b"):
            with pytest.raises(PathEscape):
                bundle.path(rel)
            with pytest.raises(PathEscape):
                bundle.write(rel, b"", "doc")
    assert left_beside(output) == []


def test_reserved_names_are_refused(output: Path) -> None:
    with BundleWriter(output) as bundle:
        for rel in ("manifest.json", "manifest.sha256", "build.json", "README.md"):
            with pytest.raises(BuildError):
                bundle.write(rel, b"", "doc")
        with pytest.raises(BuildError):
            bundle.write_unhashed("other", b"")


def test_a_file_can_be_added_once_and_only_as_a_plain_file(output: Path) -> None:
    with BundleWriter(output) as bundle:
        bundle.write("text/a.json", b"", "config")
        with pytest.raises(BuildError):
            bundle.write("text/a.json", b"", "config")
        with pytest.raises(BuildError, match="twice"):
            bundle.add("text/a.json", "config")
        bundle.path("text/link.json").symlink_to("a.json")
        with pytest.raises(BuildError, match="not a plain file"):
            bundle.add("text/link.json", "config")
        os.link(bundle.path("text/a.json"), bundle.path("text/hard.json"))
        with pytest.raises(BuildError, match="not a plain file"):
            bundle.add("text/hard.json", "config")
        with pytest.raises(BuildError, match="absent"):
            bundle.add("text/absent.json", "config")


def test_what_is_staged_must_be_what_was_added(output: Path) -> None:
    with BundleWriter(output) as bundle:
        fill(bundle)
        bundle.path("stray").write_bytes(b"")
        with pytest.raises(BuildError, match="'stray' was written but never added"):
            bundle.publish(manifest_of)
        bundle.path("stray").unlink()
        bundle.path("stray").symlink_to("/tmp")
        with pytest.raises(BuildError, match="'stray' was written but never added"):
            bundle.publish(manifest_of)
        bundle.path("stray").unlink()
        bundle.path(WEIGHTS).write_bytes(b"later")
        with pytest.raises(BuildError, match="changed after"):
            bundle.publish(manifest_of)
    assert not output.exists()


def test_empty_directories_are_not_published(output: Path) -> None:
    with BundleWriter(output) as bundle:
        fill(bundle)
        bundle.path("never/written/file")
        bundle.publish(manifest_of)
    with open_bundle(output) as opened:
        opened.verify().close()


def test_an_invalid_manifest_is_not_published(output: Path) -> None:
    with BundleWriter(output) as bundle:
        fill(bundle)
        with pytest.raises(BuildError, match="does not list"):
            bundle.publish(lambda rows: manifest_of(rows).model_copy(update={"files": rows[1:]}))
        with pytest.raises(BuildError, match="not valid"):
            bundle.publish(lambda rows: manifest_of(rows).model_copy(update={"runtime": {"x": float("nan")}}))
        with pytest.raises(BuildError, match=r"not valid.*Later"):
            bundle.publish(lambda rows: manifest_of(rows).model_copy(update={"features_required": ("Later",)}))
        with pytest.raises(BuildError, match=r"\$\.source"):
            bundle.publish(lambda rows: type(manifest_of()).model_validate({"files": rows}))
    assert not output.exists()


def test_reading_needs_neither_filelock_nor_rfc8785(made: Path) -> None:
    code = """
import sys
sys.modules["filelock"] = sys.modules["rfc8785"] = None
from diffkiln.bundle import BundleWriter, open_bundle, manifest
from diffkiln.errors import MissingDependency
opened = open_bundle(sys.argv[1])
opened.verify().close()
for write in (lambda: manifest.dump_manifest(opened.manifest), BundleWriter(sys.argv[1] + "2").__enter__):
    try:
        write()
    except MissingDependency as error:
        assert "pip install 'diffkiln[compile]'" in str(error)
    else:
        raise SystemExit("no error")
bad = {"torch", "diffusers", "numpy", "safetensors"} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code, str(made)], check=True, cwd=Path(__file__).parents[2])


def test_the_manifest_on_disk_parses(made: Path) -> None:
    assert parse_manifest((made / "manifest.json").read_bytes()).source["model"] == "tiny"
