"""The commands about integrity and origin: `verify` and `sign`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffkiln.cli.group import FILE
from diffkiln.cli.printing import Watch, show, size_of

if TYPE_CHECKING:
    from diffkiln.bundle import Pin, Policy, Verified
    from diffkiln.bundle.sign import Signer

POLICY = click.option(
    "--policy",
    type=click.Path(path_type=Path),
    help="Policy file that says whose signatures count (default: your own).",
)


@click.command("verify")
@click.argument("bundle", type=FILE)
@POLICY
def verify(bundle: Path, policy: Path | None) -> None:
    """Check BUNDLE's files and its signature.

    Hashes every file and compares the digests with the manifest. The policy says whose signatures count; without an
    option it is diffkiln/policy.json in your configuration folder.
    """
    from diffkiln.bundle import find_policy, has_receipt, open_bundle, require_signer

    trusted = find_policy(policy)
    with open_bundle(bundle) as opened, Watch() as watch:
        size = hashed_bytes(bundle)
        with opened.verify(watch.hashing(size), receipt="renew") as verified:
            signed = _signed_by(verified, trusted, require_signer(verified, trusted))
        origin = "built here by you" if has_receipt(opened.id) else "no receipt: not known to be built here"
    part = "" if opened.whole else f"; partial: engines for {', '.join(opened.targets) or 'no target'} alone"
    show(f"{opened.id}  {len(opened.files)} files, {size_of(size)}, all as hashed{part}; {origin}; {signed}")


@click.command("sign")
@click.argument("bundle", type=FILE)
@click.option("--key", type=FILE, help="Private key: elliptic curve, PEM, not encrypted.")
@click.option("--certificate", type=FILE, help="Certificate of the key (PEM).")
@click.option("--chain", type=FILE, multiple=True, help="Intermediate certificate up to the root (PEM); repeatable.")
@click.option("--sigstore", is_flag=True, help="Sign with your identity at sigstore, without a key. Needs the network.")
@click.option("--identity-token", help="OpenID Connect token for sigstore (default: a browser opens).")
@click.option("--force", is_flag=True, help="Replace the signature that is there.")
def sign(
    bundle: Path,
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    sigstore: bool,
    identity_token: str | None,
    force: bool,
) -> None:
    """Sign BUNDLE.

    Writes manifest.sig into the bundle. The bundle's id stays the same. The bundle is hashed before it is signed.
    """
    from diffkiln.bundle import claimed, sign_bundle

    signer = _signer(key, certificate, chain, sigstore, identity_token)
    with Watch() as watch:
        progress = watch.hashing(hashed_bytes(bundle))
        identity, signature = sign_bundle(bundle, signer, force=force, progress=progress)
    show(f"{identity}  signed with {claimed(signature)}")


def hashed_bytes(bundle: Path) -> int:
    """Returns how many bytes a bundle's files have."""
    from diffkiln.bundle import open_bundle

    with open_bundle(bundle, ignore_signature=True) as opened:
        return sum(row.size for row in opened.manifest.files)


def _signer(
    key: Path | None, certificate: Path | None, chain: tuple[Path, ...], sigstore: bool, token: str | None
) -> Signer:
    from diffkiln.bundle import sign_with_certificate, sign_with_key, sign_with_sigstore

    if sigstore == (key is not None):
        raise click.UsageError("Give either --key or --sigstore. With --key, --certificate adds the key's certificate")
    if sigstore and (certificate or chain):
        raise click.UsageError("--certificate and --chain go with --key, not with --sigstore. Remove them")
    if token and not sigstore:
        raise click.UsageError("--identity-token goes with --sigstore. Add --sigstore or remove it")
    if chain and certificate is None:
        raise click.UsageError("--chain goes with --certificate. Add --certificate or remove it")
    if key is None:
        return lambda manifest: sign_with_sigstore(manifest, token)
    if certificate is None:
        return lambda manifest: sign_with_key(manifest, key)
    return lambda manifest: sign_with_certificate(manifest, key, certificate, chain)


def _signed_by(verified: Verified, policy: Policy | None, pin: Pin | None) -> str:
    from diffkiln.bundle import claimed, signer_of

    if verified.signature is None:
        return "not signed"
    if pin is not None and policy is not None:
        return f"signed by {pin}, whom {policy.path} pins"
    signer_of(verified.signature, None)  # a broken signature is one whoever made it
    return f"signed by {claimed(verified.signature)}, whom no policy pins"
