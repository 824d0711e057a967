"""Who may load native code. A digest proves that bytes are whole, not where they come from.

A bundle that this user built has a receipt: an empty file, named by the bundle's id, in a directory that no one
else can write to. The id covers every byte, so the bundle may move; and without the receipt, or the user's
word, its native code is not loaded.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.bundle.verified import Verified
from diffkiln.errors import BuildError, NativeCodeRefused

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class NativePermit:
    """Leave to load the native code of one verified bundle, and why. Made by `authorise_native` alone."""

    verified: Verified
    reason: str


def authorise_native(verified: Verified, allow_native: bool = False) -> NativePermit:
    """Decide whether this bundle's native code may be loaded. Raises `NativeCodeRefused`."""
    native = [row.path for row in verified.files if row.role == "native"]
    if not native:
        return NativePermit(verified, "the bundle holds no native code")
    if allow_native:
        return NativePermit(verified, "the user allowed it")
    if has_receipt(verified.id):
        return NativePermit(verified, "this user built the bundle")
    more = f" and {len(native) - 3} more" if len(native) > 3 else ""
    raise NativeCodeRefused(
        f"the bundle {verified.path} holds native code ({', '.join(native[:3])}{more}), which can do whatever you "
        f"can do, and nothing shows that you built it (no receipt for the id {verified.id}). If you trust where "
        "it comes from, say so: load(..., allow_native=True), or --allow-native on the command line"
    )


def write_receipt(bundle_id: str) -> None:
    """Note that this user built the bundle. Raises `BuildError` if the note cannot be kept."""
    name = _checked(bundle_id)
    directory = state_dir("receipts")
    try:
        descriptor = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise BuildError(f"the receipt {directory}/{name} cannot be written: {error.strerror}") from error
    os.close(descriptor)


def has_receipt(bundle_id: str) -> bool:
    """Whether this user built the bundle here. Raises `IntegrityError` if others could have said so."""
    directory = existing_state_dir("receipts")
    if directory is None:
        return False
    try:
        status = os.lstat(directory / _checked(bundle_id))
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _checked(bundle_id: str) -> str:
    if not _ID.fullmatch(bundle_id):
        raise ValueError(f"{bundle_id[:100]!r} is not a bundle id")
    return bundle_id
