"""The user's state directory, where locks and receipts lie, and the cache directory, which may be lost."""

from __future__ import annotations

import os
from pathlib import Path

from diffkiln.bundle.private import Home
from diffkiln.errors import BuildError


def state_dir(name: str) -> Path:
    """Returns `$XDG_STATE_HOME` (or `~/.local/state`) `/diffkiln/<name>`, and makes it if necessary, with mode 0700.

    Raises `PathEscape` for a symbolic link, `IntegrityError` if others own it or may write to it, and `BuildError` if
    it cannot be made.
    """
    return state_home().directory(name)


def existing_state_dir(name: str) -> Path | None:
    """Returns the directory as `state_dir` does, with the same checks, or `None` if it does not exist."""
    return state_home().existing(name)


def state_home() -> Home:
    """Returns the directory that `state_dir` makes directories in."""
    stated = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG specification has relative paths ignored.
    base = stated if stated.is_absolute() else _own_home("XDG_STATE_HOME") / ".local" / "state"
    return Home(base / "diffkiln", "state", "XDG_STATE_HOME")


def cache_home(root: Path | None = None) -> Home:
    """Returns the directory of caches: `root`, or else `cache_root()`. It may be a link to a larger disk."""
    path = Path(os.path.realpath(cache_root() if root is None else root))
    return Home(path, "cache", "DIFFKILN_CACHE_DIR")


def cache_root() -> Path:
    """Returns `$DIFFKILN_CACHE_DIR`, or else `diffkiln` in `$XDG_CACHE_HOME` or ~/.cache."""
    if stated := os.environ.get("DIFFKILN_CACHE_DIR"):
        return Path(stated)
    # The XDG specification has relative paths ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else _own_home("DIFFKILN_CACHE_DIR") / ".cache") / "diffkiln"


def _own_home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise BuildError(f"the user has no home directory; set {variable}") from error
