"""Weights that several processes of one user share: private copies that are mapped, and so lie in memory once.

    <cache>/weights/<SHA-256 of the file>-<where its data begins>     mode 0400, in a directory of mode 0700

A bundle's own files are never mapped: whoever can write there could change, or cut, what is in use. A copy can be
changed by this user alone. It is hashed while it is written, and a receipt notes what the system says of it then. One
that differs from its receipt is hashed again, and made anew if it is another file.

The mapping is private: pages that are only read are the page cache's, the same for all; a page that is written to
becomes the writer's own, and the file stays as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffkiln.bundle.digest import chunks
from diffkiln.bundle.hashed import stamp_of
from diffkiln.bundle.notes import read_note, write_note
from diffkiln.bundle.state import cache_home
from diffkiln.errors import DiffkilnError
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

#: The directories of copies in the cache, and of their receipts in the state directory.
COPIES, _RECEIPTS = "weights", "mapped"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


def mapped(sha256: str, size: int, data: int, write: Callable[[Path, int], None]) -> memoryview | None:
    """Returns a file's bytes in memory that processes share; None, with a line in the log, where there is no such copy.

    Args:
        sha256: Of the file.
        size: Of the file, in bytes.
        data: Where its tensors begin; they begin at a page in memory.
        write: Writes the file, behind so many zeros, to a path that does not exist, and hashes it on the way. What it
            raises of ours is passed on.
    """
    pad = -data % mmap.PAGESIZE
    try:
        directory = cache_home().directory(COPIES)
    except DiffkilnError as error:
        log.warning("weights are not shared with other processes: %s", error)
        return None
    path = directory / f"{sha256}-{data}"
    try:
        descriptor = _opened(path, sha256, pad + size, pad, write)
        try:
            whole = mmap.mmap(descriptor, pad + size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("weights are not shared with other processes: %s: %s", path, error.strerror or error)
        return None
    return memoryview(whole)[pad:]


def _opened(path: Path, sha256: str, size: int, pad: int, write: Callable[[Path, int], None]) -> int:
    """Returns a descriptor of a copy that holds the right bytes; makes the copy if need be."""
    with _locked(path.parent):  # so that one process writes, and the others find what it wrote
        with suppress(FileNotFoundError):
            descriptor = os.open(path, _READ)
            if _is_good(descriptor, path.name, sha256, size, pad):
                return descriptor
            os.close(descriptor)
            log.warning("the copy of weights %s is not what was written, and is made anew", path)
        return _made(path, pad, write)


def _is_good(descriptor: int, name: str, sha256: str, size: int, pad: int) -> bool:
    """Returns True if a copy is as its receipt says, or has the right digest."""
    status = os.fstat(descriptor)
    if (status.st_size, status.st_uid, status.st_nlink, status.st_mode & 0o777) != (size, os.geteuid(), 1, 0o400):
        return False
    noted = read_note(_RECEIPTS, name)
    if noted == _receipt(descriptor):
        return True
    digest, skipped = hashlib.sha256(), pad
    for chunk in chunks(descriptor):
        digest.update(memoryview(chunk)[skipped:])
        skipped = max(0, skipped - len(chunk))
    if digest.hexdigest() != sha256:
        return False
    write_note(_RECEIPTS, name, _receipt(descriptor))
    return True


def _made(path: Path, pad: int, write: Callable[[Path, int], None]) -> int:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(staged, pad)
        descriptor = os.open(staged, _READ)
        try:
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)  # before anything vouches for it
            os.replace(staged, path)
            write_note(_RECEIPTS, path.name, _receipt(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)
        raise
    return descriptor


def _receipt(descriptor: int) -> bytes:
    return json.dumps(stamp_of(os.fstat(descriptor))).encode()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: two processes may then write the same file twice
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
