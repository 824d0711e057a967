"""`diffkiln sign`, `diffkiln verify --policy` and `diffkiln run --policy`, and how hashing is shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffkiln.bundle import MANIFEST, SIGNATURE, hashed, open_bundle
from diffkiln.cli import main, printing
from tests.bundle.keys import make_chain, make_key
from tests.bundle.making import make


@pytest.fixture
def bundle(tmp_path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def write_policy(path: Path, *identities: dict[str, str], require: bool = False) -> str:
    path.write_text(json.dumps({"policy_version": 1, "require_signature": require, "identities": identities}))
    path.chmod(0o600)
    return str(path)


def test_a_key_signs_and_a_policy_that_pins_it_verifies(bundle, tmp_path, capsys):
    key = make_key(tmp_path, "release")
    pinned = {"kind": "key", "name": "release", "sha256": key.fingerprint}
    policy = write_policy(tmp_path / "policy.json", pinned, require=True)
    assert main(["verify", str(bundle)]) == 0
    assert capsys.readouterr().out.strip().endswith("not signed")
    assert main(["verify", str(bundle), "--policy", policy]) == 6
    assert key.fingerprint in capsys.readouterr().err
    assert main(["sign", str(bundle), "--key", str(key.private)]) == 0
    with open_bundle(bundle) as opened:
        assert capsys.readouterr().out == f"{opened.id}  signed with key sha256:{key.fingerprint}\n"
    assert main(["sign", str(bundle), "--key", str(key.private)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["verify", str(bundle), "--policy", policy]) == 0
    assert f"signed by 'release' (key sha256:{key.fingerprint}), whom {policy} pins" in capsys.readouterr().out
    assert main(["verify", str(bundle)]) == 0
    assert "whom no policy pins" in capsys.readouterr().out


def test_a_certificate_signs_and_another_identity_of_its_authority_is_refused(bundle, tmp_path, capsys):
    chain = make_chain(tmp_path / "ca", "builds@example.org")
    options = ["--key", str(chain.private), "--certificate", str(chain.certificate), "--chain", str(chain.between)]
    assert main(["sign", str(bundle), *options]) == 0
    for identity, code in (("builds@example.org", 0), ("other@example.org", 6)):
        pinned = {"kind": "certificate", "name": "CA", "roots": "ca/root.crt", "identity": identity}
        policy = write_policy(tmp_path / "policy.json", pinned, require=True)
        assert main(["verify", str(bundle), "--policy", policy]) == code
    assert "certificate of builds@example.org; pinned are 'CA' (certificate of other@" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--key", "k", "--sigstore"],
        ["--sigstore", "--chain", "c"],
        ["--key", "k", "--chain", "c"],
        ["--key", "k", "--identity-token", "t"],
    ],
)
def test_ways_to_sign_that_exclude_each_other_are_usage_errors(bundle, options, capsys):
    assert main(["sign", str(bundle), *options]) == 2
    assert "--" in capsys.readouterr().err
    assert not (bundle / SIGNATURE).exists()


def test_a_manifest_edited_under_a_signature_has_its_own_error(bundle, tmp_path, capsys):
    key = make_key(tmp_path, "release")
    assert main(["sign", str(bundle), "--key", str(key.private)]) == 0
    signature = (bundle / SIGNATURE).read_bytes()
    make(bundle, extra=b"more", force=True)
    (bundle / SIGNATURE).write_bytes(signature)
    for command in (["verify", str(bundle)], ["inspect", str(bundle)]):
        assert main(command) == 6
        assert MANIFEST in capsys.readouterr().err


def test_a_policy_that_is_none_or_that_others_can_write(bundle, tmp_path, capsys):
    assert main(["verify", str(bundle), "--policy", str(tmp_path / "none.json")]) == 2
    path = tmp_path / "policy.json"
    write_policy(path)
    path.chmod(0o666)
    assert main(["verify", str(bundle), "--policy", str(path)]) == 6
    assert "chmod go-w" in capsys.readouterr().err


def test_run_takes_native_code_that_a_pinned_key_signed(digits_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    key = make_key(tmp_path, "release")
    copy = tmp_path / "bundle"
    for path in digits_bundle.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(digits_bundle)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(digits_bundle)).write_bytes(path.read_bytes())
    command = ["run", str(copy), "--prompt", "seven", "--seed", "7", "-o", str(tmp_path / "seven.png")]
    pinned = {"kind": "key", "name": "release", "sha256": key.fingerprint}
    policy = write_policy(tmp_path / "policy.json", pinned)
    assert main([*command, "--policy", policy]) == 6
    assert f"it is not signed; pinned are 'release' (key sha256:{key.fingerprint})" in capsys.readouterr().err
    assert main(["sign", str(copy), "--key", str(key.private)]) == 0
    assert main(command) == 6
    assert main([*command, "--policy", policy]) == 0
    strict = write_policy(tmp_path / "strict.json", {**pinned, "sha256": "0" * 64}, require=True)
    assert main([*command, "--policy", strict, "--allow-native"]) == 6
    assert not (set(os.listdir(tmp_path)) & {SIGNATURE})


def test_hashing_is_shown_for_large_bundles_alone(bundle, capsys, monkeypatch):
    assert main(["verify", str(bundle)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(printing, "_WORTH_SHOWING", 1000)
    assert main(["verify", str(bundle)]) == 0
    assert capsys.readouterr().err == "hash 21.9 kB\n"


def test_on_a_terminal_hashing_counts_up(bundle, capsys, monkeypatch):
    monkeypatch.setattr(printing, "_WORTH_SHOWING", 1000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["verify", str(bundle)]) == 0
    assert "hash  21.9 kB of 21.9 kB" in capsys.readouterr().err


def test_a_second_load_does_not_say_that_it_hashes(digits_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        printing, "_WORTH_SHOWING", sum(path.stat().st_size for path in digits_bundle.rglob("weights/*/*"))
    )
    monkeypatch.setattr(hashed, "SETTLED_NS", 0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    command = ["run", str(digits_bundle), "--prompt", "seven", "--seed", "7", "-o", str(tmp_path / "seven.png")]
    for more, said in (([], True), ([], False), (["--rehash"], True)):
        assert main([*command, "--allow-native", *more]) == 0
        assert ("hash " in capsys.readouterr().err) is said
