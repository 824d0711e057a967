"""The bytes of a bundle's open files: read whole, hashed, and compared with what the manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from diffkiln.bundle import safe_open
from diffkiln.bundle.digest import Progress, chunks
from diffkiln.bundle.hashed import Stamp
from diffkiln.bundle.manifest import FileEntry
from diffkiln.errors import DigestMismatch

AGAIN = "Fetch or build the bundle again"


def check_digest(row: FileEntry, descriptor: int, progress: Progress | None = None) -> None:
    """Hashes an open file. Raises `DigestMismatch` if it is not the file of the row."""
    digest = hashlib.sha256()
    for chunk in chunks_of(row.path, descriptor):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    if digest.hexdigest() != row.sha256:
        raise mismatch(row)


def check_unwritten(path: str, before: Stamp, now: Stamp) -> None:
    """Raises `DigestMismatch` if size or mtime changed."""
    if now[:2] != before[:2]:
        raise DigestMismatch(f"{path!r} was written to while in use. {AGAIN}")


def chunks_of(path: str, descriptor: int) -> Iterator[bytes]:
    """Yields the file's bytes. Errors while reading name `path`."""
    with safe_open.explained(path):
        yield from chunks(descriptor)


def mismatch(row: FileEntry) -> DigestMismatch:
    return DigestMismatch(f"{row.path!r} is not the file that the manifest names. {AGAIN}")
