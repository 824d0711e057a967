"""The engine's directory as an input: bytes say what is put beside, over and in the place of its files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from diffkiln.bundle import authorise_native, open_bundle
from diffkiln.errors import DiffkilnError
from tests.bundle.making import CONTENT, ENGINE, NATIVE, make

#: Where entries are put: the engine's own files and directories, their neighbours, the root.
_FOLDERS = (NATIVE, f"{ENGINE}/inner", f"{ENGINE}/inner/kernel.cubin", f"{ENGINE}/data", ENGINE, "engines/cpu", "")
_NAMES = ("", "x.so", "model.so", "MODEL.SO", ".git", "a\nb", "\udcff", "n" * 255, "manifest.json", "inner")


@cache
def _pristine() -> tuple[Path, Path]:
    """A whole bundle, and the room in which copies of it are damaged."""
    room = Path(tempfile.mkdtemp(prefix="diffkiln-fuzz-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    make(room / "whole")
    (room / "outside").write_bytes(b"not in the bundle")
    return room / "whole", room


def run(data: bytes) -> None:
    """What is loaded is what the manifest names, in a directory of its own; otherwise it is refused."""
    whole, room = _pristine()
    damaged = room / "damaged"
    shutil.copytree(whole, damaged)
    try:
        for index in range(0, len(data) - 2, 3):
            _put(damaged, room / "outside", *data[index : index + 3])
        _load(damaged)
    finally:
        shutil.rmtree(damaged)


def _load(path: Path) -> None:
    try:
        with open_bundle(path) as bundle, bundle.verify() as verified:
            permit = authorise_native(verified, True, None)
            copy = permit.verified.native_copy(ENGINE)
            files = [entry for entry in copy.rglob("*") if not entry.is_dir()]
            found = {f"{ENGINE}/{entry.relative_to(copy).as_posix()}": entry.read_bytes() for entry in files}
            assert not copy.is_relative_to(path)
            assert found == {name: data for name, (role, data) in CONTENT.items() if role == "native"}
    except DiffkilnError as error:
        str(error)


def _put(root: Path, outside: Path, kind: int, place: int, name: int) -> None:
    """One change. One that the file system does not allow is none."""
    parent = root / _FOLDERS[place % len(_FOLDERS)]
    target = parent / _NAMES[name % len(_NAMES)]
    if target == root:
        return
    try:
        match kind % 8:
            case 0:
                _write(target)
            case 1:
                target.mkdir(parents=True)
            case 2:
                _remove(target)
                target.symlink_to(outside)
            case 3:
                _remove(target)
                target.symlink_to(parent, target_is_directory=True)
            case 4:
                os.mkfifo(target)
            case 5:
                _remove(target)
                os.link(outside, target)
            case 6:
                os.truncate(target, place)
            case _:
                _remove(target)
    except OSError:
        return


def _write(target: Path) -> None:
    """Neither through a link nor, for ever, into a pipe that nobody reads."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    with open(descriptor, "wb") as file:
        file.write(b"put here")


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
