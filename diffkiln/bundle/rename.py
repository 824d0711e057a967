"""The two renames that publishing needs and Python does not offer: never over something, and both ways at once.

Linux `renameat2(2)`. With the exchange there is no moment at which the output's name leads nowhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
# What a kernel, a C library or a file system (NFS, some FUSE) says that does not know the flags.
_UNKNOWN = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def rename_new(source: Path, target: Path) -> None:
    """Renames a file or directory. Raises `FileExistsError` if `target` exists."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names atomically. Returns False if the file system cannot."""
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
