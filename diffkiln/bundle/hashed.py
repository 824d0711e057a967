"""What an earlier load hashed: a receipt, so that an unchanged bundle is not hashed a second time.

It lies in the user's state directory (mode 0700), one file for each bundle id and place, and holds for every file of
weights what the system says of it: size, times of the last change of content and of anything (mtime, ctime), inode
and device. If one of these differs the file is hashed again. Programs, configuration and native code are always
hashed: they are small.

A write changes both times; mtime can be set back, ctime cannot without setting the clock. A change within one tick
of the file system's clock would go unseen, so a file that was touched just before it was hashed is not noted.
What this does not see: bits that rot on the disk, and a user who writes into their own state directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkiln.bundle import strict_json
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.notes import MAX_NOTE_BYTES, read_note, write_note
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

Stamp = tuple[int, int, int, int, int]
"""Size, mtime and ctime in nanoseconds, inode, device."""

# Far more than the tick of any clock that file systems take times from, FAT's two seconds included.
SETTLED_NS = 3_000_000_000
_KIND = "hashed"


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def recall(identity: str, directory: Path) -> dict[str, Stamp]:
    """Returns the stamps of the files that were hashed here; none if there is no reliable receipt."""
    data = read_note(_KIND, _name(identity, directory))
    try:
        return _parse(data) if data is not None else {}
    except ValueError as error:  # not a reason not to load: everything is hashed
        log.warning("hashing %s again, since the notes of earlier hashes cannot be read: %s", directory, error)
        return {}


def remember(identity: str, directory: Path, stamps: Mapping[str, Stamp]) -> None:
    """Notes which files have been hashed. If nothing can be written (a read-only home), the next load hashes again."""
    data = json.dumps({"place": str(directory), "files": stamps}).encode(errors="surrogateescape")
    write_note(_KIND, _name(identity, directory), data)


def settled(stamp: Stamp, started_ns: int) -> bool:
    """Returns True if the file had not been touched for a while when hashing began (`time.time_ns`)."""
    return max(stamp[1], stamp[2]) < started_ns - SETTLED_NS


class Receipt:
    """The notes that one load leaves for the next.

    Args:
        identity, path: the bundle's id and directory.
        known: what the receipt says already.
        started_ns: when the load began (`time.time_ns`).
    """

    def __init__(self, identity: str, directory: Path, known: Mapping[str, Stamp], started_ns: int) -> None:
        self._identity, self._directory, self._known, self._started_ns = identity, directory, known, started_ns

    def note(self, stamps: Mapping[str, Stamp]) -> None:
        """Notes files that have been hashed, unless they were touched just before."""
        kept = {
            path: stamp
            for path, stamp in stamps.items()
            if self._known.get(path) == stamp or settled(stamp, self._started_ns)
        }
        if kept != self._known:
            remember(self._identity, self._directory, kept)
            self._known = kept


def _name(identity: str, directory: Path) -> str:
    return f"{identity}-{sha256_bytes(os.fsencode(directory))[:32]}.json"


def _parse(data: bytes) -> dict[str, Stamp]:
    raw: Any = strict_json.loads(data, max_bytes=MAX_NOTE_BYTES)
    files = raw.get("files") if isinstance(raw, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it is not a receipt")
    for stamp in files.values():
        if not isinstance(stamp, list) or len(stamp) != 5 or not all(type(value) is int for value in stamp):
            raise ValueError("it is not a receipt")
    return {path: (stamp[0], stamp[1], stamp[2], stamp[3], stamp[4]) for path, stamp in files.items()}
