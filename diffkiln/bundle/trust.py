"""Who may load native code. A digest proves that bytes are whole, not where they come from.

A bundle that this user built has a receipt: an empty file, named by the bundle's id, in a directory that no one
else can write to. The id covers every byte, so the bundle may move; and without the receipt, the signature of an
identity that the user's policy pins, or the user's word, its native code is not loaded.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from diffkiln.bundle.policy import Pin, Policy
from diffkiln.bundle.signers import claimed, signer_of
from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.bundle.verified import Verified
from diffkiln.errors import BuildError, NativeCodeRefused, SignerRefused

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class NativePermit:
    """The permission to load one verified bundle's native code, with its reason. Made by `authorise_native` alone."""

    verified: Verified
    reason: str


def authorise_native(verified: Verified, allow_native: bool = False, policy: Policy | None = None) -> NativePermit:
    """Decides whether this bundle's native code may be loaded.

    Raises `NativeCodeRefused`, `SignatureInvalid` for a broken signature, and `MissingDependency` if a signature cannot
    be checked without the extra `sign`.
    """
    native = [row.path for row in verified.files if row.role == "native"]
    if not native:
        return NativePermit(verified, "the bundle holds no native code")
    if allow_native:
        return NativePermit(verified, "the user allowed it")
    if has_receipt(verified.id):
        return NativePermit(verified, "this user built the bundle")
    pin = _signer(verified, policy)
    if pin is not None:
        return NativePermit(verified, f"signed by {pin}, which the policy pins")
    more = f" and {len(native) - 3} more" if len(native) > 3 else ""
    raise NativeCodeRefused(
        f"the bundle {verified.path} holds native code ({', '.join(native[:3])}{more}), which can do whatever you "
        f"can do, and nothing shows that you built it (no receipt for the id {verified.id}) or that somebody whom "
        f"you trust did ({_found_against_pinned(verified, policy)}). If you trust where it comes from, say so: "
        "load(..., allow_native=True), or --allow-native on the command line"
    )


def require_signer(verified: Verified, policy: Policy | None) -> Pin | None:
    """Returns the pinned identity that signed the bundle; `None` if there is none and the policy does not require one.

    Raises `SignerRefused` if the policy requires one, and as `authorise_native` if the signature cannot be checked.
    """
    pin = _signer(verified, policy)
    if pin is None and policy is not None and policy.require_signature:
        raise SignerRefused(
            f"the policy {policy.path} requires a signature of an identity that it pins, and the bundle "
            f"{verified.path} has none: {_found_against_pinned(verified, policy)}. Have it signed (`diffkiln sign`), "
            "or pin who signed it"
        )
    return pin


def _signer(verified: Verified, policy: Policy | None) -> Pin | None:
    """Returns the signer's pin. Without pins nothing is checked, so a signed bundle also loads without the extra."""
    if verified.signature is None or policy is None or not policy.pins:
        return None
    return signer_of(verified.signature, policy)


def _found_against_pinned(verified: Verified, policy: Policy | None) -> str:
    if verified.signature is None:
        found = "it is not signed"
    elif policy is None:
        found = "it is signed, and there is no policy that pins an identity"
    else:
        found = f"it is signed by {claimed(verified.signature)}" if policy.pins else "it is signed"
    if policy is None:
        return found
    return f"{found}; pinned are {', '.join(map(str, policy.pins)) or 'none'}, by {policy.path}"


def write_receipt(bundle_id: str) -> None:
    """Notes that this user built the bundle. Raises `BuildError` if the note cannot be kept."""
    name = _checked(bundle_id)
    directory = state_dir("receipts")
    try:
        descriptor = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise BuildError(f"the receipt {directory}/{name} cannot be written: {error.strerror}") from error
    os.close(descriptor)


def has_receipt(bundle_id: str) -> bool:
    """Returns True if this user built the bundle here. Raises `IntegrityError` if others could have written the
    receipt.
    """
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
