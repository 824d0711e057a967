"""Finds and frees what diffkiln keeps on this machine and may go: caches, and what killed processes left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from diffkiln.bundle.mapped import COPIES
from diffkiln.bundle.output import lock_output
from diffkiln.bundle.scratch import dead, folders
from diffkiln.bundle.state import cache_home, state_home
from diffkiln.errors import OutputBusy

_BUILDS = ("engines", "toolchain", "architectures", "recovered")
# What another process is writing just now is younger.
_OLD_SECONDS = 3600
_UNFINISHED = re.compile(r"\..+\.(?:pull|staging-\d+-[0-9a-f]{16})")


@dataclass(frozen=True)
class Freeable:
    """A file or folder that may be removed.

    Attributes:
        kind: one of `KINDS`.
        path: a file or a folder.
        bytes: its size.
    """

    kind: str
    path: Path
    bytes: int


def freeable(kinds: Collection[str]) -> list[Freeable]:
    """Returns what there is of these kinds, in their order.

    Raises:
        IntegrityError: a directory of caches or of state is another user's, or open to others.
    """
    found: list[Freeable] = []
    for kind, look in _LOOKS.items():
        if kind in kinds:
            found += [Freeable(kind, path, _size(path)) for path in look()]
    return found


def free(item: Freeable) -> str:
    """Removes the item. Returns the reason if it stays, and an empty text once it is gone."""
    try:
        with _held(item):
            _remove(item.path)
    except (OutputBusy, BlockingIOError):
        return "another process uses it"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


@contextmanager
def _held(item: Freeable) -> Iterator[None]:
    """Raises `BlockingIOError` or `OutputBusy` for what another process uses."""
    if item.kind == "bundles":
        lock = lock_output(item.path)
        try:
            yield
        finally:
            lock.release()
    else:
        # A build holds the whole cache (diffkiln.exporters.cache), and others what is theirs.
        with _locked(cache_home().path if item.kind in _BUILDS else item.path):
            yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that nobody else holds. Raises `BlockingIOError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise
            # a file system without locks: nobody can hold one
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _whole(name: str) -> Callable[[], Iterator[Path]]:
    def look() -> Iterator[Path]:
        directory = cache_home().existing(name)
        if directory is not None and any(directory.iterdir()):
            yield directory

    return look


def _bundles() -> Iterator[Path]:
    """Yields each bundle in the cache, without those that are still being fetched."""
    for path in _in_bundles():
        if path.is_dir() and not path.name.startswith("."):
            yield path


def _in_bundles() -> Iterator[Path]:
    directory = cache_home().existing("bundles")
    if directory is not None:
        yield from sorted(directory.glob("*/*/*"))
        yield from sorted(directory.glob("*/*/.*"))


def _kernels() -> Iterator[Path]:
    directory = state_home().existing("kernels")
    if directory is not None:
        yield from sorted(directory.glob("*.cache"))


def _leftovers() -> Iterator[Path]:
    for folder in folders():
        yield from dead(folder)
    for name in ("engines", "architectures"):
        if (directory := cache_home().existing(name)) is not None:
            yield from dead(directory)
    for path in _in_bundles():
        if _UNFINISHED.fullmatch(path.name) and _is_free(path):
            yield path
    yield from filter(_is_free, _in_state("locks", "*.lock"))
    for name in ("hashed", "fetched", "kernels"):
        yield from filter(_is_old, _in_state(name, ".*"))


def _in_state(name: str, pattern: str) -> list[Path]:
    directory = state_home().existing(name)
    return sorted(directory.glob(pattern)) if directory is not None else []


def _is_free(path: Path) -> bool:
    """Returns True if no process holds its lock."""
    try:
        with _locked(path):
            return True
    except OSError:
        return False


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        return os.lstat(path).st_mtime < time.time() - _OLD_SECONDS
    return False


def _size(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a folder; links count as themselves."""
    total = 0
    pending = [path]
    while pending:
        with suppress(OSError):
            item = pending.pop()
            status = os.lstat(item)
            total += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            if stat.S_ISDIR(status.st_mode):
                pending.extend(item.iterdir())
    return total


_LOOKS: dict[str, Callable[[], Iterator[Path]]] = {
    "engines": _whole("engines"),
    "toolchain": _whole("toolchain"),
    "bundles": _bundles,
    "architectures": _whole("architectures"),
    "recovered": _whole("recovered"),
    "kernels": _kernels,
    "weights": _whole(COPIES),
    "leftovers": _leftovers,
}
#: What may be freed.
KINDS = tuple(_LOOKS)
