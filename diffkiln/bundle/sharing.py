"""Weights that a bundle shares with the one that it replaces, and the other names that their files have meanwhile.

A name elsewhere is a way to write into a file that was hashed, so a file that has one is refused. A writer that makes a
bundle anew with the same weights links them into its staging instead of copying them; until it is done, or for good
where it is killed, each has a second name there. The staging is private to the bundle's owner, so that name lets nobody
in, and the bundle stays as good as it was.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: What copy_file_range(2) says of files that it does not copy.
_NOT_IN_KERNEL = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF})


def staging_pattern(name: str) -> re.Pattern[str]:
    """Returns the pattern of the names of a bundle's staging directories."""
    return re.compile(rf"\.{re.escape(name)}\.staging-\d+-[0-9a-f]{{16}}")


def only_staged(bundle: Path, path: str, status: os.stat_result) -> bool:
    """Returns True if all other names of the bundle's file `path` are in private staging beside the bundle."""
    for _ in range(3):  # a writer may come or go between the two looks
        if status.st_nlink == 1 + sum(os.path.samestat(status, other) for other in _staged(bundle, path, status)):
            return True
        try:
            again = os.lstat(bundle / path)
        except OSError:
            return False
        if not os.path.samestat(status, again):
            return False
        status = again
    return status.st_nlink == 1


def _staged(bundle: Path, path: str, status: os.stat_result) -> Iterator[os.stat_result]:
    """Yields the status of the file at the same path in each of the bundle's staging directories."""
    pattern = staging_pattern(bundle.name)
    with suppress(OSError):
        for name in os.listdir(bundle.parent):
            staging = bundle.parent / name
            if pattern.fullmatch(name) and _is_private(staging, status.st_uid):
                for inner in ("bundle", "old"):
                    with suppress(OSError):
                        yield os.lstat(staging / inner / path)


def _is_private(directory: Path, owner: int) -> bool:
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == owner and not status.st_mode & 0o077


def link(source: Path, target: Path, status: os.stat_result) -> bool:
    """Gives the open file a second name. Returns False if the file system cannot, or if `source` is now another file.

    Raises `FileExistsError` if `target` exists.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        return False
    if os.path.samestat(os.lstat(target), status):
        return True
    target.unlink()
    return False


def clone(descriptor: int, target: Path) -> None:
    """Copies an open file inside the kernel, which shares blocks where the file system can; otherwise through memory.

    Raises `OSError` if `target` exists or cannot be written.
    """
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
        done, size = 0, os.fstat(descriptor).st_size
        try:
            while done < size and (count := os.copy_file_range(descriptor, file.fileno(), size - done, done, done)):
                done += count
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL:
                raise
        file.seek(done)
        while part := os.pread(descriptor, 1 << 24, done):
            done += file.write(part)
