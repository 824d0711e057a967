"""Private keys and certificates for the tests, made anew each run."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from diffkiln.bundle.signature import fingerprint


@dataclass(frozen=True)
class Key:
    private: Path
    public: Path
    fingerprint: str


def make_key(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> Key:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(pem_of(key))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, kind))
    return Key(private, public, fingerprint(key.public_key().public_bytes(serialization.Encoding.DER, kind)))


@dataclass(frozen=True)
class Chain:
    """A root, an authority between, and the certificate of `identity` with its key."""

    private: Path
    certificate: Path
    between: Path
    root: Path


def make_chain(folder: Path, identity: str) -> Chain:
    folder.mkdir()
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "between", "leaf")}
    root = _certificate("root", keys["root"], "root", keys["root"], authority=True)
    between = _certificate("between", keys["between"], "root", keys["root"], authority=True)
    leaf = _certificate("leaf", keys["leaf"], "between", keys["between"], identity=identity)
    paths = {name: folder / f"{name}.crt" for name in keys}
    for path, certificate in zip(paths.values(), (root, between, leaf), strict=True):
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "leaf.pem").write_bytes(pem_of(keys["leaf"]))
    return Chain(folder / "leaf.pem", paths["leaf"], paths["between"], paths["root"])


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool = False,
    identity: str = "",
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=authority,
                crl_sign=authority,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if identity:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
