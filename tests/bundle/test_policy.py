from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffkiln.bundle import find_policy, read_policy
from diffkiln.bundle.signature import fingerprint, key_of_pem, pem_of_key
from diffkiln.errors import IntegrityError, PolicyInvalid
from tests.bundle.keys import make_key

SHA = "0123456789abcdef" * 4
KEY = {"kind": "key", "name": "release", "sha256": SHA}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "config" / "diffkiln"
    place.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.parent))
    return place


def write(path: Path, **changed: Any) -> Path:
    path.write_text(json.dumps({"policy_version": 1, "identities": [KEY]} | changed))
    path.chmod(0o600)
    return path


def test_the_users_own_policy_counts_where_none_is_given(home: Path, tmp_path: Path) -> None:
    assert find_policy(None) is None
    own = write(home / "policy.json")
    policy = find_policy(None)
    assert policy is not None
    assert policy.path == own
    assert [str(pin) for pin in policy.pins] == [f"'release' (key sha256:{SHA})"]
    other = write(tmp_path / "other.json", identities=[])
    found = find_policy(other)
    assert found is not None
    assert found.pins == ()
    assert find_policy(policy) is policy


def test_without_xdg_the_policy_lies_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    (tmp_path / ".config" / "diffkiln").mkdir(parents=True, mode=0o700)
    (tmp_path / ".config").chmod(0o700)
    path = write(tmp_path / ".config" / "diffkiln" / "policy.json")
    policy = find_policy(None)
    assert policy is not None
    assert policy.path == path


def test_a_policy_that_was_asked_for_has_to_be_there(home: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid, match=r"none\.json cannot be read: No such file") as caught:
        find_policy(tmp_path / "none.json")
    assert caught.value.exit_code == 2
    (home / "policy.json").symlink_to("nowhere")  # the user meant to have one
    with pytest.raises(PolicyInvalid, match="No such file"):
        find_policy(None)


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"policy_version": 2}, r"\$\.policy_version"),
        ({"require_signatures": True}, r"\$\.require_signatures"),
        ({"require_signature": 1}, r"\$\.require_signature"),
        ({"require_signature": True, "identities": []}, "nothing could be loaded"),
        ({"identities": [{**KEY, "sha256": SHA.upper()}]}, r"\$\.identities\[0\].*sha256"),
        ({"identities": [{**KEY, "pem": "x.pub"}]}, 'either "sha256" or "pem"'),
        ({"identities": [{"kind": "key", "name": "x"}]}, 'either "sha256" or "pem"'),
        ({"identities": [{**KEY, "kind": "person"}]}, r"\$\.identities\[0\]"),
        ({"identities": [KEY, {"kind": "sigstore", "name": "CI", "identity": "x"}]}, r"\$\.identities\[1\].*issuer"),
        ({"identities": [{"kind": "key", "name": "x", "pem": "none.pub"}]}, r"\$\.identities\[0\]\.pem: .*none\.pub"),
        ({"identities": [{"kind": "key", "name": "x", "pem": "policy.json"}]}, r"\[0\]\.pem: .*PUBLIC KEY"),
        (
            {"identities": [{"kind": "certificate", "name": "x", "roots": "policy.json", "identity": "y"}]},
            r"\$\.identities\[0\]\.roots: .*holds no certificate",
        ),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_with_its_path(tmp_path: Path, changed: Any, where: str) -> None:
    path = write(tmp_path / "policy.json", **changed)
    with pytest.raises(PolicyInvalid, match=where) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"[" * 100_000, b'{"policy_version": 1, "policy_version": 1}', b"\xff", b" " * (2**20 + 1)]
)
def test_what_is_no_policy_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(PolicyInvalid, match=r"policy\.json"):
        read_policy(path)


@pytest.mark.parametrize("what", ["file", "directory", "key"])
def test_a_policy_that_others_can_write_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    key = make_key(folder, "mine")
    path = write(folder / "policy.json", identities=[{"kind": "key", "name": "mine", "pem": "mine.pub"}])
    assert read_policy(path).pins[0].identity == key.fingerprint
    target = {"file": path, "directory": folder, "key": key.public}[what]
    for mode in (0o720, 0o702):
        target.chmod(mode)
        with pytest.raises(IntegrityError, match=f"{target.name} can be written by others. Run: chmod go-w"):
            read_policy(path)


def test_a_policy_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "policy.json")
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:  # only root can give a file away: be somebody else instead
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(IntegrityError, match="another user"):
        read_policy(path)


def test_a_policy_that_is_a_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.json", 0o600)
    with pytest.raises(PolicyInvalid, match="not a plain file"):
        read_policy(tmp_path / "policy.json")


def test_a_key_is_read_and_written_as_openssl_does(tmp_path: Path) -> None:
    key = make_key(tmp_path, "mine")
    pem = key.public.read_bytes()
    assert pem_of_key(key_of_pem(pem)) == pem
    assert fingerprint(key_of_pem(pem)) == key.fingerprint
    for broken in (pem + pem, pem[:-30], key.private.read_bytes(), b"", pem.replace(b"M", b"?")):
        with pytest.raises(ValueError):
            key_of_pem(broken)
