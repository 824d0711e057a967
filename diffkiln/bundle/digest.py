"""SHA-256 of files and of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator

# Called with the number of bytes hashed since the last call, so that it can drive a progress bar.
Progress = Callable[[int], None]

_CHUNK = 1 << 22


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(source: int | str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Hashes a whole file, given by path or by descriptor. A descriptor's position is neither used nor moved."""
    if isinstance(source, int):
        return _sha256_descriptor(source, progress)
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _sha256_descriptor(descriptor, progress)
    finally:
        os.close(descriptor)


def chunks(descriptor: int) -> Iterator[bytes]:
    """Yields the file's bytes from its beginning to its present end."""
    offset = 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        offset += len(chunk)
        yield chunk


def _sha256_descriptor(descriptor: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(descriptor):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()
