"""Putting a signature into a bundle. The manifest, and so the bundle's id, stay as they are."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from diffkiln.bundle import safe_open
from diffkiln.bundle.digest import Progress, sha256_bytes
from diffkiln.bundle.layout import MANIFEST, SIGNATURE
from diffkiln.bundle.manifest import MAX_MANIFEST_BYTES
from diffkiln.bundle.reader import open_bundle
from diffkiln.bundle.signature import Signature, parse_signature
from diffkiln.bundle.staging import explained
from diffkiln.errors import DigestMismatch, SpecError
from diffkiln.guards.gate import gated

Signer = Callable[[bytes], bytes]
"""From the bytes of a manifest to those of its signature: see `signers`."""


@gated("progress")
def sign_bundle(
    path: str | os.PathLike[str], signer: Signer, *, force: bool = False, progress: Progress | None = None
) -> tuple[str, Signature]:
    """Hashes the whole bundle, signs its manifest, and stores the signature beside it, in one step.

    Returns the bundle's id and the signature. `force` replaces an existing signature, broken or not. Raises `SpecError`
    if there is a signature already or the bundle cannot be signed, whatever `Bundle.verify` raises if the bundle is not
    whole, `MissingDependency` without the extra, and `BuildError` if the signature cannot be written.
    """
    # A signature of an earlier manifest, which keeps the bundle from being opened, may be what is to be replaced.
    with open_bundle(path, ignore_signature=force) as bundle:
        if bundle.signature is not None and not force:
            raise SpecError(f"{bundle.path} is signed already; pass --force to replace the signature")
        with bundle.verify(progress):
            root = safe_open.open_root(bundle.path)
            try:
                manifest = safe_open.read_small(root, MANIFEST, MAX_MANIFEST_BYTES)
                if sha256_bytes(manifest) != bundle.id:
                    raise DigestMismatch(f"{bundle.path}: {MANIFEST} changed while it was being signed")
                data = signer(manifest)
                _install(data, bundle.path, root)
            finally:
                os.close(root)
    return bundle.id, parse_signature(data, manifest)


def _install(data: bytes, bundle: Path, root: int) -> None:
    """Writes the signature beside the bundle first: a half-made file inside would be one that the manifest does not
    name.
    """
    staged = bundle.parent / f".{bundle.name}.signing-{os.getpid()}-{secrets.token_hex(8)}"
    with explained(bundle / SIGNATURE, "write", len(data)):
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, SIGNATURE, dst_dir_fd=root)
            os.fsync(root)
        except BaseException:
            with suppress(OSError):
                os.unlink(staged)
            raise
