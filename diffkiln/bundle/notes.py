"""Small files in the user's state directory, each written whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.errors import DiffkilnError
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

MAX_NOTE_BYTES = 64 * 1024 * 1024


def read_note(kind: str, name: str) -> bytes | None:
    """Returns a note's bytes; `None` where there is none that can be relied on.

    Args:
        kind: the directory of notes of this kind.
        name: the note's, which is safe as the name of a file.
    """
    try:
        directory = existing_state_dir(kind)
        if directory is None:
            return None
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(MAX_NOTE_BYTES) if os.fstat(descriptor).st_uid == os.geteuid() else None
    except FileNotFoundError:
        return None
    except (OSError, DiffkilnError) as error:
        log.warning("the notes of files that were %s cannot be read: %s", kind, error)
        return None


def write_note(kind: str, name: str, data: bytes) -> None:
    """Writes a note. If nothing can be written (a read-only home), logs that, and the note is missing later."""
    try:
        directory = state_dir(kind)
        staged = directory / f".{secrets.token_hex(16)}"
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(data)
            os.replace(staged, directory / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(staged)
            raise
    except (OSError, DiffkilnError) as error:
        log.info("the next load will not know which files were %s: %s", kind, error)
