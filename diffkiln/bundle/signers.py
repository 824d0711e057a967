"""Making and checking signatures, by the package `model-signing` (extra `sign`), which is imported when needed.

It signs and checks paths. It is given copies, in a private directory, of the bytes that were read and hashed, so
that what it looks at cannot be exchanged for something else on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffkiln.bundle.layout import MANIFEST, SIGNATURE
from diffkiln.bundle.policy import Pin, Policy, describe
from diffkiln.bundle.scratch import scratch
from diffkiln.bundle.signature import Signature, fingerprint, parse_signature, pem_of_key, with_key
from diffkiln.errors import IntegrityError, MissingDependency, SignatureInvalid, SpecError


def sign_with_key(manifest: bytes, key: Path) -> bytes:
    """Signs with an elliptic-curve private key (PEM, not encrypted: P-256, P-384 or P-521). Raises `SpecError`."""
    data = _signed(manifest, lambda config: config.use_elliptic_key_signer(private_key=key), f"key {key}")
    return with_key(data, _public_key(key))


def sign_with_certificate(manifest: bytes, key: Path, certificate: Path, chain: Iterable[Path]) -> bytes:
    """Signs with a certificate's private key; `chain` holds the certificates between it and the root."""

    def configure(config: Any) -> Any:
        return config.use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=tuple(chain)
        )

    return _signed(manifest, configure, f"certificate {certificate}")


def sign_with_sigstore(manifest: bytes, identity_token: str | None) -> bytes:
    """Signs without a key, by sigstore. Needs the network, and a browser if there is no token."""

    def configure(config: Any) -> Any:
        return config.use_sigstore_signer(identity_token=identity_token, use_ambient_credentials=True)

    return _signed(manifest, configure, "sigstore identity (this needs the network)")


def signer_of(signature: Signature, policy: Policy | None) -> Pin | None:
    """Returns the pinned identity that made the signature; `None` if the policy pins no such identity.

    Raises `SignatureInvalid` for a forged or broken signature, and `MissingDependency` without the extra `sign`.
    """
    pins = [pin for pin in (policy.pins if policy else ()) if pin.method == signature.method]
    if signature.method == "key":
        return _key_signer(signature, pins)
    names = names_in(signature.certificate)
    failure: SignatureInvalid | None = None
    for pin in pins:
        if pin.identity in names:
            try:
                _check(signature, pin)
                return pin
            except SignatureInvalid as error:  # another pin of the same name may have other roots
                failure = error
    if failure is not None:
        raise failure
    return None


def claimed(signature: Signature) -> str:
    """Returns the identity that the signature names, in words."""
    if signature.method != "key":
        return describe(signature.method, " = ".join(sorted(names_in(signature.certificate))) or "nobody")
    if signature.key:
        return describe("key", fingerprint(signature.key))
    return f"a key that it does not hold (SHA-256 of its PEM: {signature.hint[:64]!r})"


def names_in(certificate: bytes) -> frozenset[str]:
    """Returns the identities in a certificate: its alternative names, or else its common name."""
    _library()
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        read = x509.load_der_x509_certificate(certificate)
        try:
            names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            kinds = (x509.RFC822Name, x509.DNSName, x509.UniformResourceIdentifier)
            return frozenset(name for kind in kinds for name in names.get_values_for_type(kind))
        except x509.ExtensionNotFound:
            return frozenset(str(item.value) for item in read.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    except Exception as error:
        raise SignatureInvalid(f"{SIGNATURE}: its certificate cannot be read: {error}") from error


def _key_signer(signature: Signature, pins: list[Pin]) -> Pin | None:
    """Returns the pin whose key made the signature. A key in the signature tells a broken one from a stranger's."""
    known = {signature.key} if signature.key else {pin.key for pin in pins if _hint(pin.key) == signature.hint}
    if not known:
        return None
    (key,) = known
    _check(signature, Pin("", "key", fingerprint(key), key=key))
    return next((pin for pin in pins if pin.identity == fingerprint(key)), None)


def _hint(key: bytes) -> str:
    return fingerprint(pem_of_key(key))


def _check(signature: Signature, pin: Pin) -> None:
    """Checks the signature against one identity with model-signing. Raises `SignatureInvalid`."""
    config = _library().verifying.Config()
    with scratch("signature") as folder:
        (folder / MANIFEST).write_bytes(signature.manifest)
        (folder / SIGNATURE).write_bytes(signature.data)
        try:
            _configure(config, pin, folder)
            config.verify(folder / MANIFEST, folder / SIGNATURE)
        except IntegrityError:
            raise
        except Exception as error:  # model-signing passes on whatever the libraries below it raise
            reason = str(error) or type(error).__name__
            what = claimed(signature)
            raise SignatureInvalid(f"{SIGNATURE}, which names {what}, does not hold: {reason}") from error


def _configure(config: Any, pin: Pin, folder: Path) -> None:
    if pin.method == "sigstore":
        try:
            config.use_sigstore_verifier(identity=pin.identity, oidc_issuer=pin.issuer)
        except Exception as error:
            raise IntegrityError(
                f"sigstore's root of trust cannot be had ({error}): checking {pin} needs the network"
            ) from error
        return
    (folder / "trusted.pem").write_bytes(pin.roots or pem_of_key(pin.key))
    if pin.method == "key":
        config.use_elliptic_key_verifier(public_key=folder / "trusted.pem")
    else:
        config.use_certificate_verifier(certificate_chain=[folder / "trusted.pem"])


def _signed(manifest: bytes, configure: Callable[[Any], Any], what: str) -> bytes:
    library = _library()
    hashing = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    config = library.signing.Config().set_hashing_config(hashing.set_ignored_paths(paths=[], ignore_git_paths=False))
    with scratch("signature") as folder:
        (folder / MANIFEST).write_bytes(manifest)
        try:
            configure(config).sign(folder / MANIFEST, folder / SIGNATURE)
            data = (folder / SIGNATURE).read_bytes()
        except Exception as error:
            raise SpecError(f"cannot sign with the {what}: {str(error) or type(error).__name__}") from error
    parse_signature(data, manifest)  # what cannot be read back is not handed out
    return data


def _public_key(private: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(private.read_bytes(), None).public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _library() -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MissingDependency(f"signatures need the package {error.name}: pip install 'diffkiln[sign]'") from error
    return model_signing
