from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from diffkiln.bundle import (
    MANIFEST,
    SIGNATURE,
    Policy,
    authorise_native,
    open_bundle,
    read_policy,
    require_signer,
    sign_bundle,
    sign_with_certificate,
    sign_with_key,
    write_receipt,
)
from diffkiln.errors import (
    BuildError,
    DigestMismatch,
    Incompatible,
    IntegrityError,
    MissingDependency,
    NativeCodeRefused,
    PathEscape,
    SignatureInvalid,
    SignerRefused,
    SpecError,
)
from tests.bundle.keys import Chain, Key, make_chain, make_key
from tests.bundle.making import DOC, left_beside, make

IDENTITY = "builds@example.org"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def key(folder: Path) -> Key:
    return make_key(folder, "release")


@pytest.fixture(scope="module")
def chain(folder: Path) -> Chain:
    return make_chain(folder / "ours", IDENTITY)


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    """Writes a policy that pins these identities and reads it."""

    def write(*identities: dict[str, str], require: bool = False) -> Policy:
        path = tmp_path / "policy.json"
        path.write_text(
            json.dumps({"policy_version": 1, "require_signature": require, "identities": identities}), encoding="utf-8"
        )
        path.chmod(0o600)
        return read_policy(path)

    return write


def by_key(key: Key, name: str = "release") -> dict[str, str]:
    return {"kind": "key", "name": name, "sha256": key.fingerprint}


def by_certificate(chain: Chain, identity: str = IDENTITY) -> dict[str, str]:
    return {"kind": "certificate", "name": "our CA", "roots": str(chain.root), "identity": identity}


def sign(path: Path, key: Key, force: bool = False) -> str:
    return sign_bundle(path, lambda manifest: sign_with_key(manifest, key.private), force=force)[0]


def sign_by(path: Path, chain: Chain) -> None:
    sign_bundle(path, lambda data: sign_with_certificate(data, chain.private, chain.certificate, [chain.between]))


def reason(path: Path, policy: Policy | None) -> str:
    with open_bundle(path) as bundle, bundle.verify() as verified:
        return authorise_native(verified, policy=policy).reason


def test_a_signature_leaves_the_id_and_every_other_byte_as_they_were(made: Path, key: Key) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    with open_bundle(made) as bundle:
        identity = bundle.id
    assert sign(made, key) == identity
    after = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {made / SIGNATURE}
    assert all(after[path] == data for path, data in before.items())
    assert left_beside(made) == []
    with open_bundle(made, expect_id=identity) as bundle:
        bundle.verify().close()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_native_code_signed_by_a_pinned_key_is_allowed(
    made: Path, tmp_path: Path, policy: Any, curve: ec.EllipticCurve
) -> None:
    key = make_key(tmp_path, "mine", curve)
    sign(made, key)
    assert "'release'" in reason(made, policy(by_key(key)))
    assert key.fingerprint in reason(made, policy({"kind": "key", "name": "by file", "pem": str(key.public)}))


def test_native_code_signed_by_a_pinned_certificate_is_allowed(made: Path, chain: Chain, policy: Any) -> None:
    sign_by(made, chain)
    assert IDENTITY in reason(made, policy(by_certificate(chain)))


def test_a_signature_of_another_key_is_refused_naming_found_against_pinned(
    made: Path, key: Key, tmp_path: Path, policy: Any
) -> None:
    other = make_key(tmp_path, "other")
    sign(made, other)
    for pins in ([by_key(key)], []):
        with pytest.raises(NativeCodeRefused) as caught:
            reason(made, policy(*pins))
        assert all(pin["sha256"] in str(caught.value) for pin in pins)
    with pytest.raises(NativeCodeRefused, match=f"signed by key sha256:{other.fingerprint}; pinned are 'release'"):
        reason(made, policy(by_key(key)))


def test_a_signature_of_another_person_of_the_same_authority_is_refused(made: Path, chain: Chain, policy: Any) -> None:
    sign_by(made, chain)
    with pytest.raises(NativeCodeRefused, match=f"certificate of {IDENTITY}; pinned are .*other@example.org"):
        reason(made, policy(by_certificate(chain, "other@example.org")))


def test_a_certificate_of_the_right_name_from_another_authority_does_not_hold(
    made: Path, chain: Chain, tmp_path: Path, policy: Any
) -> None:
    sign_by(made, make_chain(tmp_path / "theirs", IDENTITY))
    with pytest.raises(SignatureInvalid, match=IDENTITY):
        reason(made, policy(by_certificate(chain)))
    theirs = {**by_certificate(chain), "roots": str(tmp_path / "theirs" / "root.crt")}
    assert IDENTITY in reason(made, policy(by_certificate(chain), theirs))


def test_a_policy_leaves_receipts_and_the_users_word_as_they_are(made: Path, key: Key, policy: Any) -> None:
    with open_bundle(made) as bundle, bundle.verify() as verified:
        assert "allowed" in authorise_native(verified, allow_native=True, policy=policy(by_key(key))).reason
        write_receipt(bundle.id)
        assert "built" in authorise_native(verified, policy=policy(by_key(key))).reason


def test_a_policy_can_require_signatures(made: Path, key: Key, tmp_path: Path, policy: Any) -> None:
    strict = policy(by_key(key), require=True)
    with open_bundle(made) as bundle, bundle.verify() as verified:
        assert require_signer(verified, policy(by_key(key))) is None
        with pytest.raises(SignerRefused, match=f"not signed; pinned are .*{key.fingerprint}") as caught:
            require_signer(verified, strict)
        assert caught.value.exit_code == 6
    sign(made, make_key(tmp_path, "other"))
    with (
        open_bundle(made) as bundle,
        bundle.verify() as verified,
        pytest.raises(SignerRefused, match=f"signed by key .*; pinned are .*{key.fingerprint}"),
    ):
        require_signer(verified, strict)
    sign(made, key, force=True)
    with open_bundle(made) as bundle, bundle.verify() as verified:
        assert str(require_signer(verified, strict)) == f"'release' (key sha256:{key.fingerprint})"


# What was changed afterwards


def rebuild(path: Path) -> None:
    """Another manifest, with its digest, under the old signature."""
    signature = (path / SIGNATURE).read_bytes()
    make(path, extra=b" more", force=True)
    (path / SIGNATURE).write_bytes(signature)


def test_a_manifest_edited_under_a_signature_is_found_without_any_policy(made: Path, key: Key) -> None:
    sign(made, key)
    rebuild(made)
    with pytest.raises(SignatureInvalid, match=f"{MANIFEST} is that of .*sign it again") as caught:
        open_bundle(made)
    assert caught.value.exit_code == 6


def test_a_signed_file_edited_is_found_by_its_digest(made: Path, key: Key) -> None:
    sign(made, key)
    (made / DOC).write_bytes(b"read ME")
    with open_bundle(made) as bundle, pytest.raises(DigestMismatch, match=DOC):
        bundle.verify()


def edit(path: Path, change: Any) -> None:
    raw = json.loads((path / SIGNATURE).read_bytes())
    change(raw)
    (path / SIGNATURE).write_text(json.dumps(raw))


def edit_statement(path: Path, change: Any) -> None:
    def inner(raw: Any) -> None:
        statement = json.loads(base64.b64decode(raw["dsseEnvelope"]["payload"]))
        change(statement)
        raw["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit(path, inner)


def test_a_statement_made_to_fit_an_edited_manifest_does_not_hold(made: Path, key: Key, policy: Any) -> None:
    sign(made, key)
    rebuild(made)
    with open_bundle(made, ignore_signature=True) as bundle:
        digest = bundle.id
    edit_statement(made, lambda statement: statement["predicate"]["resources"][0].update(digest=digest))
    with pytest.raises(SignatureInvalid, match="does not hold"):
        reason(made, policy(by_key(key)))


def test_a_flipped_bit_in_the_signature_does_not_hold(made: Path, key: Key, policy: Any) -> None:
    sign(made, key)

    def flip(raw: Any) -> None:
        sig = bytearray(base64.b64decode(raw["dsseEnvelope"]["signatures"][0]["sig"]))
        sig[-1] ^= 1
        raw["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(sig).decode()

    edit(made, flip)
    with pytest.raises(SignatureInvalid, match="does not hold"):
        reason(made, policy(by_key(key)))


def test_another_key_put_into_the_signature_does_not_hold(made: Path, key: Key, tmp_path: Path, policy: Any) -> None:
    sign(made, make_key(tmp_path, "other"))
    der = base64.b64encode(base64.b64decode(b"".join(key.public.read_bytes().splitlines()[1:-1]))).decode()
    edit(made, lambda raw: raw["verificationMaterial"]["publicKey"].update(rawBytes=der))
    with pytest.raises(SignatureInvalid, match="Key mismatch"):
        reason(made, policy(by_key(key)))


@pytest.mark.parametrize(
    "change",
    [
        lambda statement: statement.update(predicateType="https://model_signing/Digests/v0.1"),
        lambda statement: statement["predicate"]["serialization"].update(method="shards"),
        lambda statement: statement["predicate"].update(resources=[]),
        lambda statement: statement["predicate"]["resources"].append(statement["predicate"]["resources"][0]),
        lambda statement: statement["predicate"]["resources"][0].update(algorithm="blake2b"),
        lambda statement: statement["predicate"]["resources"][0].update(name="other.json"),
    ],
)
def test_a_statement_of_anything_but_the_manifest_is_refused(made: Path, key: Key, change: Any) -> None:
    sign(made, key)
    edit_statement(made, change)
    with pytest.raises(SignatureInvalid, match=r"is not the signature of a manifest\.json"):
        open_bundle(made)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"a": NaN}',
        b"\xff",
        b'{"verificationMaterial": 1}',
        b'{"a": 1, "a": 2}',
    ],
)
def test_what_is_no_signature_is_refused(made: Path, data: bytes) -> None:
    (made / SIGNATURE).write_bytes(data)
    with pytest.raises(SignatureInvalid, match=r"manifest\.sig"):
        open_bundle(made)


def test_a_signature_that_is_too_large_is_refused_by_its_size(made: Path) -> None:
    (made / SIGNATURE).touch()
    os.truncate(made / SIGNATURE, 2**40)
    with pytest.raises(IntegrityError, match=r"manifest\.sig.*more than"):
        open_bundle(made)


def test_a_signature_that_is_no_plain_file_is_refused_without_blocking(made: Path) -> None:
    os.mkfifo(made / SIGNATURE)
    with pytest.raises(PathEscape, match="a FIFO"):
        open_bundle(made)


# Signing


def test_a_signature_that_is_there_is_replaced_by_force_alone(made: Path, key: Key, tmp_path: Path) -> None:
    sign(made, key)
    before = (made / SIGNATURE).read_bytes()
    with pytest.raises(SpecError, match="--force"):
        sign(made, make_key(tmp_path, "other"))
    assert (made / SIGNATURE).read_bytes() == before
    rebuild(made)
    sign(made, key, force=True)
    open_bundle(made).close()


def test_a_bundle_that_is_not_whole_is_not_signed(made: Path, key: Key) -> None:
    (made / DOC).write_bytes(b"read ME")
    with pytest.raises(DigestMismatch):
        sign(made, key)
    assert not (made / SIGNATURE).exists()


def test_a_signature_that_cannot_be_written_leaves_the_old_one(
    made: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(made, key)
    before = (made / SIGNATURE).read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(BuildError, match="No space left on device"):
                sign(made, key, force=True)
        assert (made / SIGNATURE).read_bytes() == before
        assert left_beside(made) == []


@pytest.mark.parametrize("data", [None, b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_cannot_be_used_is_named(made: Path, tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "broken.pem"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SpecError, match=r"broken\.pem"):
        sign_bundle(made, lambda manifest: sign_with_key(manifest, path))
    assert not (made / SIGNATURE).exists()


def test_a_certificate_of_another_key_is_refused(made: Path, key: Key, chain: Chain) -> None:
    with pytest.raises(SpecError, match="does not match"):
        sign_bundle(made, lambda data: sign_with_certificate(data, key.private, chain.certificate, []))


def test_without_the_extra_the_error_names_it(made: Path, key: Key, policy: Any, monkeypatch: Any) -> None:
    sign(made, key)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependency, match=r"pip install 'diffkiln\[sign\]'") as caught:
        reason(made, policy(by_key(key)))
    assert isinstance(caught.value, Incompatible)
    with open_bundle(made) as bundle, bundle.verify() as verified:  # nobody asks who signed
        assert "allowed" in authorise_native(verified, allow_native=True).reason


def test_model_signing_itself_accepts_the_signature(made: Path, key: Key) -> None:
    sign(made, key)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(made / MANIFEST)]
    command += ["--signature", str(made / SIGNATURE), "--public_key", str(key.public)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_signature_by_model_signing_itself_is_accepted_where_the_key_is_given(
    made: Path, key: Key, policy: Any
) -> None:
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(made / MANIFEST)]
    command += ["--signature", str(made / SIGNATURE), "--private_key", str(key.private)]
    subprocess.run(command, capture_output=True, check=True)
    assert key.fingerprint in reason(made, policy({"kind": "key", "name": "file", "pem": str(key.public)}))
    with pytest.raises(NativeCodeRefused, match="a key that it does not hold"):
        reason(made, policy(by_key(key)))
