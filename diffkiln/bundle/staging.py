"""Where a bundle is put together: a private directory beside the output, and how it takes the output's place.

    .NAME.staging-<pid>-<random>/     0700, and locked by the process that works in it
        bundle/                       becomes the output
        old/                          the output that is being replaced, where the two cannot be exchanged

What is fetched goes into `.NAME.pull` instead, which stays after a failure so that the next run can go on from there.

Old or whole new, never half: at every moment the output's name leads to the old bundle or to the new one. (Where
the file system cannot exchange two names there is a moment at which it leads nowhere; the next run puts `old`
back.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from diffkiln.bundle.rename import exchange, rename_new
from diffkiln.bundle.sharing import staging_pattern
from diffkiln.errors import BuildError, PathEscape


class Staging:
    """The staging directory of one writer. The caller holds the lock of `output`.

    With `resumed`, an earlier run's staging and its content are kept.
    """

    def __init__(self, output: Path, resumed: bool = False) -> None:
        name = "pull" if resumed else f"staging-{os.getpid()}-{secrets.token_hex(8)}"
        self._output = output
        self._resumed = resumed
        self._directory = output.parent / f".{output.name}.{name}"
        self._lock = -1
        self.root = self._directory / "bundle"

    def create(self) -> None:
        with explained(self._output.parent, "make a staging directory in"):
            try:
                self._directory.mkdir(mode=0o700, exist_ok=self._resumed)
                # Held while this process lives: that is how another run knows a dead one's staging.
                self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._resumed:
                    _check_ours(self._directory, self._lock)
                    _put_back(self._directory, self._output)
                self.root.mkdir(exist_ok=self._resumed)
            except BaseException:
                self.close() if self._resumed else self.remove()
                raise

    def remove(self) -> None:
        """Removes the staging and everything in it. The next run removes what cannot be removed now."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leaves the staging to the next run."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def install(self) -> None:
        """Moves the synced content of `root` to the output's name: all or nothing, also on Ctrl-C."""
        aside = self._directory / "old"
        with explained(self._output, "publish"):
            if not os.path.lexists(self._output):
                self._install_new()
            elif exchange(self.root, self._output):
                self._sync_or(lambda: exchange(self.root, self._output))
            else:
                try:
                    os.rename(self._output, aside)
                    self._install_new()
                except BaseException:
                    if not os.path.lexists(self._output):
                        os.rename(aside, self._output)
                    raise

    def _install_new(self) -> None:
        rename_new(self.root, self._output)
        self._sync_or(lambda: os.rename(self._output, self.root))

    def _sync_or(self, undo: Callable[[], object]) -> None:
        try:
            sync(self._output.parent)
        except BaseException:
            undo()
            raise


def remove_stale(output: Path) -> None:
    """Removes the staging directories that dead runs for `output` left, and first restores a bundle set aside.

    The caller holds the lock of `output`. Staging that another process has locked, or that belongs to another user,
    stays.
    """
    pattern = staging_pattern(output.name)
    for name in sorted(os.listdir(output.parent)):
        if pattern.fullmatch(name):
            with suppress(OSError):
                _remove_if_dead(output.parent / name, output)


def _remove_if_dead(staging: Path, output: Path) -> None:
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _put_back(staging, output)
        shutil.rmtree(staging)
    finally:
        os.close(descriptor)


def _put_back(staging: Path, output: Path) -> None:
    """Restores the output's name after a run died between two renames."""
    if (staging / "old").is_dir() and not os.path.lexists(output):
        os.rename(staging / "old", output)


def _check_ours(path: Path, descriptor: int) -> None:
    """Checks that nobody else made the directory or can write to it, and so could have put links into it."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PathEscape(f"{path} belongs to another user, or is open to others. Remove it")


def walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields every directory, the inner ones first, with its entries that are no directories. Follows no links."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for directory, inner, files in os.walk(root, topdown=False, onerror=fail):
        links = [name for name in inner if Path(directory, name).is_symlink()]
        yield Path(directory), [Path(directory, name) for name in (*links, *files)]


def sync_tree(root: Path) -> None:
    """Syncs every file and every directory to the disk, the inner ones first."""
    for directory, files in walk(root):
        for file in files:
            sync(file)
        sync(directory)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def is_full(error: OSError) -> bool:
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def explained(path: Path, doing: str, needed: int | None = None) -> Iterator[None]:
    """Turns an `OSError` raised while `doing` something to `path` into a `BuildError` with both and the reason."""
    try:
        yield
    except OSError as error:
        need = f"{needed} bytes are needed" if needed is not None else "more room is needed"
        raise explain(error, path, doing, need) from error


def explain(error: OSError, path: Path, doing: str, need: str) -> BuildError:
    text = f"cannot {doing} {path}: {error.strerror or error}"
    if not is_full(error):
        return BuildError(text)
    where = next(parent for parent in (path, *path.parents) if parent.is_dir())
    return BuildError(f"{text}: {need}, {free_bytes(where)} bytes are free in {where}. Make room or write elsewhere")
