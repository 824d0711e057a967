"""The user's policy: whose signatures count, and whether a bundle has to have one.

    $XDG_CONFIG_HOME/diffkiln/policy.json, or another file by `--policy`
    {
      "policy_version": 1,
      "require_signature": false,
      "identities": [
        {"kind": "key", "name": "release", "sha256": "<SHA-256 of the public key as DER>"},
        {"kind": "key", "name": "mine", "pem": "mine.pub"},
        {"kind": "certificate", "name": "our CA", "roots": "ca.pem", "identity": "builds@example.org"},
        {"kind": "sigstore", "name": "CI", "identity": "https://github.com/…", "issuer": "https://token.actions…"}
      ]
    }

Paths are relative to the file. Whoever can write the file decides what runs, so it, and the keys it names, have to
be the user's or root's, and closed to others.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from diffkiln.bundle import strict_json
from diffkiln.bundle.manifest import problems
from diffkiln.bundle.signature import Method, fingerprint, key_of_pem
from diffkiln.errors import IntegrityError, PolicyInvalid, Problem
from diffkiln.guards.gate import gated

MAX_POLICY_BYTES = 1024 * 1024

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    # Strict about what it does not know: a policy with a misspelt rule would be a weaker one.
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="forbid")


class _KeyEntry(_Entry):
    kind: Literal["key"]
    name: _Text
    sha256: _Sha256 | None = None
    pem: _Text | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> _KeyEntry:
        if (self.sha256 is None) == (self.pem is None):
            raise ValueError('a key is pinned by either "sha256" or "pem"')
        return self


class _CertificateEntry(_Entry):
    kind: Literal["certificate"]
    name: _Text
    roots: _Text
    identity: _Text


class _SigstoreEntry(_Entry):
    kind: Literal["sigstore"]
    name: _Text
    identity: _Text
    issuer: _Text


_AnyEntry = Annotated[_KeyEntry | _CertificateEntry | _SigstoreEntry, Field(discriminator="kind")]


class _File(_Entry):
    policy_version: Literal[1]
    require_signature: bool = False
    identities: Annotated[tuple[_AnyEntry, ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _can_be_met(self) -> _File:
        if self.require_signature and not self.identities:
            raise ValueError("signatures are required and no identity is pinned: nothing could be loaded")
        return self


@dataclass(frozen=True)
class Pin:
    """One identity whose signature counts."""

    name: str
    method: Method
    identity: str  # the key's fingerprint, or the name in the certificate
    issuer: str = ""  # sigstore's: who vouched for the name
    key: bytes = b""  # DER, where the policy gave the key itself
    roots: bytes = b""  # PEM of the authorities that may have issued the certificate

    def __str__(self) -> str:
        return f"{self.name!r} ({describe(self.method, self.identity)})"


@dataclass(frozen=True)
class Policy:
    """A user's policy of trusted signers, made by `read_policy`."""

    path: Path
    require_signature: bool
    pins: tuple[Pin, ...]


def describe(method: Method, identity: str) -> str:
    return f"key sha256:{identity}" if method == "key" else f"{method} of {identity}"


@gated()
def find_policy(stated: Policy | str | os.PathLike[str] | None) -> Policy | None:
    """Returns the policy that the caller named, or else the user's own if there is one.

    Raises `PolicyInvalid` if a named policy is missing or malformed, and `IntegrityError` if others could have written
    it.
    """
    if isinstance(stated, Policy):
        return stated
    if stated is not None:
        return read_policy(Path(stated))
    path = default_path()
    return read_policy(path) if path is not None and os.path.lexists(path) else None


def default_path() -> Path | None:
    """Returns the path of the user's own policy; `None` if there is no home directory."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not base.is_absolute():  # the XDG specification has relative paths ignored
        try:
            base = Path.home() / ".config"
        except RuntimeError:
            return None
    return base / "diffkiln" / "policy.json"


def read_policy(path: Path) -> Policy:
    """Reads a policy and the keys that it names. Raises as `find_policy`."""
    data = _read_own(path, "")
    try:
        strict_json.loads(data, max_bytes=MAX_POLICY_BYTES)
        file = _File.model_validate_json(data)
    except strict_json.StrictJSONError as error:
        raise PolicyInvalid(f"{path}: {error}") from error
    except ValidationError as error:
        found = [Problem(f"{path}: {item.where}", item.reason) for item in problems(error)]
        raise PolicyInvalid(problems=found) from error
    pins = tuple(_pin(path, f"$.identities[{index}]", entry) for index, entry in enumerate(file.identities))
    return Policy(path, file.require_signature, pins)


def _pin(path: Path, where: str, entry: _KeyEntry | _CertificateEntry | _SigstoreEntry) -> Pin:
    if isinstance(entry, _SigstoreEntry):
        return Pin(entry.name, "sigstore", entry.identity, issuer=entry.issuer)
    if isinstance(entry, _CertificateEntry):
        roots = _read_own(path.parent / entry.roots, f"{path}: {where}.roots: ")
        if b"-----BEGIN CERTIFICATE-----" not in roots:
            raise PolicyInvalid(f"{path}: {where}.roots: {entry.roots!r} holds no certificate in PEM form")
        return Pin(entry.name, "certificate", entry.identity, roots=roots)
    if entry.sha256 is not None:
        return Pin(entry.name, "key", entry.sha256)
    assert entry.pem is not None
    try:
        key = key_of_pem(_read_own(path.parent / entry.pem, f"{path}: {where}.pem: "))
    except ValueError as error:
        raise PolicyInvalid(f"{path}: {where}.pem: {entry.pem!r}: {error}") from error
    return Pin(entry.name, "key", fingerprint(key), key=key)


def _read_own(path: Path, where: str) -> bytes:
    """Returns the bytes of a file that no one else can write or replace."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_own(path, os.fstat(descriptor), where)
            _check_own(path.parent, os.stat(path.parent), where)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_POLICY_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PolicyInvalid(f"{where}{path} cannot be read: {reason}") from error
    if len(data) > MAX_POLICY_BYTES:
        raise PolicyInvalid(f"{where}{path} is larger than the {MAX_POLICY_BYTES} bytes that are read")
    return data


def _check_own(path: Path, status: os.stat_result, where: str) -> None:
    directory = stat.S_ISDIR(status.st_mode)
    if not directory and not stat.S_ISREG(status.st_mode):
        raise PolicyInvalid(f"{where}{path} is not a plain file")
    if status.st_uid not in {os.geteuid(), 0}:
        raise IntegrityError(f"{where}{path} belongs to another user, who could change it. Make a copy of your own")
    # In a sticky directory (/tmp) others can add files and not replace them.
    if status.st_mode & 0o022 and not (directory and status.st_mode & stat.S_ISVTX):
        raise IntegrityError(f"{where}{path} can be written by others. Run: chmod go-w {path}")
