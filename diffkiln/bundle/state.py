"""The user's state directory, where locks and receipts lie, and the cache directory, which may be lost."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from diffkiln.errors import BuildError, IntegrityError, PathEscape


def state_dir(name: str) -> Path:
    """`$XDG_STATE_HOME` (or `~/.local/state`) `/diffkiln/<name>`, made if need be: ours alone, mode 0700.

    Raises `PathEscape` for a symbolic link, `IntegrityError` if others own it or may write to it, and
    `BuildError` if it cannot be made.
    """
    base = _base() / "diffkiln"
    _make(base)
    _make(base / name)
    _check_private(base / name)
    return base / name


def existing_state_dir(name: str) -> Path | None:
    """The same, checked the same, where it exists already, else `None`; nothing is made."""
    directory = _base() / "diffkiln" / name
    try:
        _check_private(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise IntegrityError(f"{directory} cannot be looked at: {error.strerror or error}") from error
    return directory


def cache_root() -> Path:
    """`$DIFFKILN_CACHE_DIR`, else `diffkiln` in `$XDG_CACHE_HOME` or ~/.cache."""
    if stated := os.environ.get("DIFFKILN_CACHE_DIR"):
        return Path(stated)
    # The XDG specification has relative paths ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "diffkiln"


def _base() -> Path:
    stated = Path(os.environ.get("XDG_STATE_HOME", ""))
    if stated.is_absolute():  # the XDG specification has relative paths ignored
        return stated
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise BuildError("the user has no home directory; set XDG_STATE_HOME") from error


def _make(directory: Path) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # something else lies there, and the check says what
    except OSError as error:
        raise BuildError(
            f"the state directory {directory} cannot be made: {error.strerror}. Set XDG_STATE_HOME elsewhere"
        ) from error


def _check_private(directory: Path) -> None:
    # Others may look into the upper one, but whoever can write to it can put another in the lower one's place.
    for path, closed_to_others in ((directory.parent, 0o022), (directory, 0o077)):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise PathEscape(f"{path} is not a real directory. Remove it, or set XDG_STATE_HOME elsewhere")
        if status.st_uid != os.geteuid():
            raise IntegrityError(f"{path} belongs to another user. Set XDG_STATE_HOME to a directory of yours")
        if status.st_mode & closed_to_others:
            raise IntegrityError(f"{path} is open to other users. Run: chmod 700 {path}")
