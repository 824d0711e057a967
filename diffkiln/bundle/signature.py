"""`manifest.sig`: what the signature beside a manifest says of itself, before any of it is believed.

It is a sigstore bundle as `model-signing` writes it: an in-toto statement in a DSSE envelope, whose one resource is
`manifest.json`. The manifest names every byte of the bundle, so the signature covers what `model-signing`, pointed
at a directory, would leave out (`.git`, ignored paths, empty directories). Any other statement is refused, however
well it is signed: nothing here needs a key, a network or a package.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from diffkiln.bundle import strict_json
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.layout import MANIFEST, SIGNATURE
from diffkiln.bundle.manifest import problems
from diffkiln.errors import SignatureInvalid

MAX_SIGNATURE_BYTES = 1024 * 1024

Method = Literal["key", "certificate", "sigstore"]


class _Part(BaseModel):
    # Sigstore's own fields come and go; the library that checks the signature reads them, not this.
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")


class _Resource(_Part):
    name: Literal["."]  # how model-signing names a model that is one file
    algorithm: Literal["sha256"]
    digest: str


class _Serialization(_Part):
    method: Literal["files"]
    hash_type: Literal["sha256"]


class _Predicate(_Part):
    serialization: _Serialization
    resources: tuple[_Resource]


class _Statement(_Part):
    predicateType: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


class _Envelope(_Part):
    payload: Base64Bytes
    signatures: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=1)]


class _Key(_Part):
    hint: str  # SHA-256 of the key as PEM
    rawBytes: Base64Bytes = b""  # the key as DER, which `diffkiln sign` adds


class _Certificate(_Part):
    rawBytes: Base64Bytes


class _Chain(_Part):
    certificates: Annotated[tuple[_Certificate, ...], Field(min_length=1, max_length=16)]


class _Material(_Part):
    publicKey: _Key | None = None
    x509CertificateChain: _Chain | None = None
    certificate: _Certificate | None = None


class _File(_Part):
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


@dataclass(frozen=True)
class Signature:
    """A signature that names the manifest it lies beside. Who made it has yet to be checked: see `signers`."""

    data: bytes  # for model-signing
    manifest: bytes
    method: Method
    key: bytes = b""  # DER, where the method is a key and the signature holds it
    hint: str = ""  # SHA-256 of the key as PEM
    certificate: bytes = b""  # of the signer, DER, where the method is another


def parse_signature(data: bytes, manifest: bytes) -> Signature:
    """Reads a `manifest.sig` that may be hostile. Raises `SignatureInvalid`, also for the signature of another
    manifest.
    """
    try:
        raw = strict_json.loads(data, max_bytes=MAX_SIGNATURE_BYTES)
        file = _File.model_validate(raw)
        payload = strict_json.loads(file.dsseEnvelope.payload, max_bytes=MAX_SIGNATURE_BYTES)
        signed = _Statement.model_validate(payload).predicate.resources[0].digest
    except strict_json.StrictJSONError as error:
        raise SignatureInvalid(f"{SIGNATURE}: {error}. {_HINT}") from error
    except ValidationError as error:
        found = "; ".join(map(str, problems(error)))
        raise SignatureInvalid(f"{SIGNATURE} is not the signature of a {MANIFEST}: {found}. {_HINT}") from error
    if signed != (found := sha256_bytes(manifest)):
        raise SignatureInvalid(
            f"{SIGNATURE} is of the bundle {signed[:64]!r}, and {MANIFEST} is that of {found}: one of them was "
            "changed. Fetch the bundle again; if you rebuilt it, sign it again"
        )
    # What model-signing decodes is what was read here, however either takes doubtful base64.
    raw["dsseEnvelope"]["payload"] = base64.b64encode(file.dsseEnvelope.payload).decode()
    return _of(file.verificationMaterial, raw, manifest)


def _of(material: _Material, raw: dict[str, Any], manifest: bytes) -> Signature:
    # A later model-signing may not know the key that we add.
    if material.publicKey is not None:
        raw["verificationMaterial"]["publicKey"].pop("rawBytes", None)
    data = json.dumps(raw).encode()
    given = [part for part in (material.publicKey, material.x509CertificateChain, material.certificate) if part]
    if len(given) != 1:
        raise SignatureInvalid(f"{SIGNATURE} names {len(given)} keys or certificates instead of one. {_HINT}")
    if material.publicKey is not None:
        return Signature(data, manifest, "key", material.publicKey.rawBytes, material.publicKey.hint)
    if material.x509CertificateChain is not None:
        leaf = material.x509CertificateChain.certificates[0]
        return Signature(data, manifest, "certificate", certificate=leaf.rawBytes)
    assert material.certificate is not None
    return Signature(data, manifest, "sigstore", certificate=material.certificate.rawBytes)


def with_key(data: bytes, key: bytes) -> bytes:
    """Returns the signature with its public key (DER) added, so that a fingerprint is enough to pin it."""
    raw = json.loads(data)
    raw["verificationMaterial"]["publicKey"]["rawBytes"] = base64.b64encode(key).decode()
    return (json.dumps(raw, indent=2) + "\n").encode()


def fingerprint(der: bytes) -> str:
    """Returns the SHA-256 of a public key or certificate as DER: `openssl pkey -pubin -in KEY -outform DER |
    sha256sum`.
    """
    return hashlib.sha256(der).hexdigest()


def pem_of_key(der: bytes) -> bytes:
    """Returns a public key as PEM, written as OpenSSL writes it."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN PUBLIC KEY-----", *lines, b"-----END PUBLIC KEY-----", b""])


def key_of_pem(pem: bytes) -> bytes:
    """Returns the DER of the only public key in `pem`. Raises `ValueError`."""
    head, begin, rest = pem.partition(b"-----BEGIN PUBLIC KEY-----")
    body, end, tail = rest.partition(b"-----END PUBLIC KEY-----")
    if not begin or not end or b"-----BEGIN" in head + tail:
        raise ValueError('it does not hold one "PUBLIC KEY" in PEM form')
    der = base64.b64decode(b"".join(body.split()), validate=True)
    if not der:
        raise ValueError("the key is empty")
    return der


_HINT = "Fetch the bundle again, or sign it again with `diffkiln sign --force`"
