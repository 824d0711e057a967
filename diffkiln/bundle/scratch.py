"""Temporary folders that do not outlive their process, not even one that is killed.

    <temporary directory>/diffkiln-<kind>-<random>/      0700, and locked by the process that uses it

The lock goes with the process, and with children that it forked. So a folder of this user's whose lock can be had is a
dead one's, and the next process that makes a folder removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffkiln.bundle.private import closed_to_others
from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.errors import BuildError, IntegrityError, SystemRefused

# What `tempfile` and `mktemp` make has other endings: what is not ours stays.
_NAME = re.compile(r"diffkiln-[a-z]+-[0-9a-f]{16}")

#: Where this process has looked for what dead ones left.
_swept: set[Path] = set()


class Scratch:
    """A temporary folder.

    Args:
        kind: what it is for, in one word.
        parent: where it lies; the temporary directory by default, or the state directory where others could rename
            what lies in that.

    Raises:
        OSError: it cannot be made.
        IntegrityError: there is no directory that is safe from others.
    """

    def __init__(self, kind: str, parent: Path | None = None) -> None:
        where = parent if parent is not None else _safe_folder()
        if where not in _swept:
            _swept.add(where)
            remove_dead(where)
        self.path, self._lock = _made(kind, where)
        self._owner = os.getpid()

    def remove(self) -> None:
        """Removes the folder. A forked child leaves it to the parent."""
        if self._lock < 0:
            return
        if os.getpid() == self._owner:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """Yields a temporary folder and removes it afterwards. Raises as `Scratch`."""
    made = Scratch(kind)
    try:
        yield made.path
    finally:
        made.remove()


def dead(parent: Path) -> Iterator[Path]:
    """Yields the folders in `parent` that killed processes of this user left behind."""
    with suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if _NAME.fullmatch(name) and (lock := _locked_if_dead(parent / name)) is not None:
                os.close(lock)
                yield parent / name


def remove_dead(parent: Path) -> None:
    """Removes the folders in `parent` that killed processes of this user left behind."""
    for path in dead(parent):
        # Again, and held meanwhile: another process may be removing it.
        if (lock := _locked_if_dead(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def folders() -> list[Path]:
    """Returns where scratch folders may lie: the temporary directory and its substitute."""
    found = [Path(tempfile.gettempdir())]
    if (own := existing_state_dir("scratch")) is not None:
        found.append(own)
    return found


def _safe_folder() -> Path:
    temporary = Path(tempfile.gettempdir())
    if closed_to_others(temporary):
        return temporary
    try:
        return state_dir("scratch")
    except BuildError as error:
        raise IntegrityError(
            f"{temporary} lets other users put their files in the place of yours. Set TMPDIR to a directory of yours"
        ) from error


def folder_to_run() -> Path:
    """Returns where native code can lie: the state directory where the temporary one runs no programs.

    Raises:
        SystemRefused: neither does.
    """
    folder = _safe_folder()
    if runs_programs(folder):
        return folder
    with suppress(BuildError):
        if runs_programs(own := state_dir("scratch")):
            return own
    raise SystemRefused(
        f"{folder} is mounted noexec: native code cannot be loaded from there. Set TMPDIR to a directory of yours on a "
        "file system that runs programs"
    )


def runs_programs(folder: Path) -> bool:
    """Returns False for a directory on a file system that is mounted `noexec`."""
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC


def _made(kind: str, parent: Path) -> tuple[Path, int]:
    while True:
        path = parent / f"diffkiln-{kind}-{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        # Until it is locked, another process may take it for a dead one's. Then it is gone, and another is made.
        with suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(descriptor)
                os.lstat(path)
            except OSError:
                os.close(descriptor)
                raise
            return path, descriptor


def _lock(descriptor: int) -> None:
    """Locks a folder. On a file system without locks, no process can take a folder for a dead one's either."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _locked_if_dead(path: Path) -> int | None:
    """Returns a descriptor that holds the lock of a folder; `None` if the folder is in use, another user's, or gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(status, os.lstat(path)):
                return descriptor
    except OSError:  # locked by a living process, or gone
        pass
    os.close(descriptor)
    return None
