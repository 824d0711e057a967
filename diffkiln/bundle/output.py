"""The place that a bundle is written to: may it be, is something there, and is another process at it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.layout import MANIFEST
from diffkiln.bundle.manifest import FORMAT_NAME, MAX_MANIFEST_BYTES
from diffkiln.bundle.safe_open import resolve_parent
from diffkiln.bundle.staging import explain
from diffkiln.bundle.state import state_dir
from diffkiln.errors import BuildError, MissingDependency, OutputBusy, PathEscape, SpecError

if TYPE_CHECKING:
    from filelock import BaseFileLock


def checked_output(stated: str | os.PathLike[str]) -> Path:
    """Returns the output as an absolute path. Raises `SpecError` for an impossible path, and `BuildError` for a
    directory that cannot be written to.
    """
    try:
        output = resolve_parent(stated)
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(f"the output {str(stated)!r} cannot be used: {error}") from error
    if not output.name or "\0" in output.name:
        raise SpecError(f"the output {str(stated)!r} is not a name. Give a directory that is not there yet")
    if not output.parent.is_dir():
        raise SpecError(f"the output's directory {output.parent} is not there. Make it first")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise BuildError(f"the output's directory {output.parent} cannot be written to. Choose another")
    return output


def check_replaceable(output: Path, force: bool) -> None:
    """Raises `SpecError` if something is at `output`, unless it is a bundle and `force` is set."""
    try:
        mode = os.lstat(output).st_mode
    except FileNotFoundError:
        return
    if not force:
        raise SpecError(f"{output} exists; pass --force to replace it")
    if not stat.S_ISDIR(mode) or not _is_bundle(output):
        raise SpecError(f"{output} is not a diffkiln bundle, so it is not replaced. Remove it or write elsewhere")


def _is_bundle(directory: Path) -> bool:
    """Returns True if the manifest calls itself a bundle's, of any version, complete or not."""
    try:
        with open(os.open(directory / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            raw = json.loads(file.read(MAX_MANIFEST_BYTES))
        return raw["format"]["name"] == FORMAT_NAME
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


def lock_output(output: Path, wait: bool = False) -> BaseFileLock:
    """Takes the lock of this output; the caller releases it. The lock of a process that died is free.

    Raises `OutputBusy` where another process has it and `wait` is not set.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingDependency(
            "writing a bundle needs the package filelock: pip install 'diffkiln[compile]' or 'diffkiln[hub]'"
        ) from error
    path = state_dir("locks") / f"{sha256_bytes(os.fsencode(output))}.lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PathEscape(f"the lock {path} is not a plain file. Remove it")
    lock = FileLock(path, blocking=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputBusy(f"{output} is being written by another process. Wait for it or write elsewhere") from error
    except OSError as error:
        raise explain(error, path, "take the lock", "a few bytes are needed") from error
    return lock
