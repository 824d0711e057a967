"""Which engines were compared with the replay of their regions here: a receipt each, so that it is done once.

A receipt is an empty file in the user's state directory (mode 0700). Its name is a digest of the bundle's id, of the
engine's files, and of what else decides how the engine computes: the machine and the libraries. The id covers the
region's program and constants. Where others can write to the directory its receipts count for nothing.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping

from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.bundle.verified import Verified
from diffkiln.errors import DiffkilnError
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)
_DIRECTORY = "tried"


class Tried:
    """The receipts for one bundle on one machine.

    Args:
        verified: the bundle.
        machine: the processor and the versions that engines run with.
    """

    def __init__(self, verified: Verified, machine: Mapping[str, str]) -> None:
        self._verified, self._machine = verified, machine

    def has(self, path: str) -> bool:
        """Returns True if the engine at this path of the bundle was tested here."""
        try:
            directory = existing_state_dir(_DIRECTORY)
            if directory is None:
                return False
            status = os.lstat(directory / self._name(path))
        except FileNotFoundError:
            return False
        except (OSError, DiffkilnError) as error:  # not a reason not to load: the engine is tested
            log.warning("testing engines again, since the notes of earlier tests are unreliable: %s", error)
            return False
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()

    def note(self, path: str) -> None:
        """Keeps a receipt. Where nothing can be written (a read-only home), the next load tests again."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            os.close(os.open(state_dir(_DIRECTORY) / self._name(path), flags, 0o600))
        except (OSError, DiffkilnError) as error:
            log.info("the next load will test engines again: %s", error)

    def _name(self, path: str) -> str:
        digests = {
            row.path: row.sha256
            for row in self._verified.files
            if row.role == "native" and row.path.startswith(path + "/")
        }
        decisive = [self._verified.id, path, digests, dict(self._machine)]
        return sha256_bytes(json.dumps(decisive, sort_keys=True).encode())
