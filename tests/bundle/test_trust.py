from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffkiln.bundle import BundleWriter, authorise_native, has_receipt, open_bundle, state_dir, write_receipt
from diffkiln.errors import BuildError, IntegrityError, NativeCodeRefused, PathEscape
from tests.bundle.making import NATIVE, manifest_of

ID = "0123456789abcdef" * 4


def test_native_code_without_receipt_is_refused_with_a_mend(made: Path) -> None:
    with open_bundle(made) as bundle, bundle.verify() as verified:
        with pytest.raises(NativeCodeRefused, match=r"load\(\.\.\., allow_native=True\).*--allow-native") as caught:
            authorise_native(verified, allow_native=False)
        assert NATIVE in str(caught.value)
        assert verified.id in str(caught.value)
        assert caught.value.exit_code == 6


def test_native_code_is_allowed_by_the_user_or_by_a_receipt(made: Path, tmp_path: Path) -> None:
    with open_bundle(made) as bundle, bundle.verify() as verified:
        permit = authorise_native(verified, allow_native=True)
        assert permit.verified is verified
        assert "allowed" in permit.reason
        write_receipt(bundle.id)
    made.rename(tmp_path / "moved")
    with open_bundle(tmp_path / "moved") as bundle, bundle.verify() as verified:
        assert "built" in authorise_native(verified, allow_native=False).reason


def test_a_bundle_of_data_alone_needs_no_permission(output: Path) -> None:
    with BundleWriter(output) as writer:
        writer.write("licences.json", b"", "doc")
        writer.publish(manifest_of)
    with open_bundle(output) as bundle, bundle.verify() as verified:
        assert "no native code" in authorise_native(verified, allow_native=False).reason


def test_a_receipt_is_kept_in_a_private_directory(state_home: Path) -> None:
    assert not has_receipt(ID)
    assert not state_home.exists()
    write_receipt(ID)
    write_receipt(ID)
    assert has_receipt(ID)
    assert not has_receipt(ID[::-1])
    receipts = state_home / "diffkiln" / "receipts"
    assert receipts == state_dir("receipts")
    assert receipts.stat().st_mode & 0o777 == 0o700
    assert (receipts / ID).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["", "x", "../" + ID, ID.upper(), ID + "\n", ID[1:]])
def test_only_an_id_names_a_receipt(name: str) -> None:
    state_dir("receipts")
    with pytest.raises(ValueError, match="not a bundle id"):
        write_receipt(name)
    with pytest.raises(ValueError, match="not a bundle id"):
        has_receipt(name)


def test_a_receipt_that_is_a_link_does_not_count(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    (state_dir("receipts") / ID).symlink_to(target)
    assert not has_receipt(ID)
    with pytest.raises(BuildError):
        write_receipt(ID)


def test_a_receipt_of_another_user_does_not_count() -> None:
    if os.geteuid() != 0:
        pytest.skip("changing the owner needs root")
    write_receipt(ID)
    os.chown(state_dir("receipts") / ID, 12345, 12345)
    assert not has_receipt(ID)


def test_a_directory_that_others_can_write_to_is_refused(state_home: Path) -> None:
    write_receipt(ID)
    for directory in (state_home / "diffkiln", state_home / "diffkiln" / "receipts"):
        directory.chmod(0o770)
        with pytest.raises(IntegrityError, match="chmod 700"):
            has_receipt(ID)
        with pytest.raises(IntegrityError, match="chmod 700"):
            write_receipt(ID)
        directory.chmod(0o700)
    assert has_receipt(ID)


def test_a_directory_of_another_user_is_refused(state_home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("changing the owner needs root")
    write_receipt(ID)
    os.chown(state_home / "diffkiln" / "receipts", 12345, 12345)
    with pytest.raises(IntegrityError, match="another user"):
        has_receipt(ID)


@pytest.mark.parametrize("name", ["", "receipts"])
def test_a_directory_that_is_a_link_is_refused(state_home: Path, tmp_path: Path, name: str) -> None:
    write_receipt(ID)
    directory = state_home / "diffkiln" / name
    directory.rename(tmp_path / "aside")
    directory.symlink_to(tmp_path / "aside")
    with pytest.raises(PathEscape):
        has_receipt(ID)
    with pytest.raises(PathEscape):
        write_receipt(ID)


def test_a_state_home_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="Set XDG_STATE_HOME"):
        write_receipt(ID)
    assert not has_receipt(ID)


def test_without_xdg_the_state_lies_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_dir("receipts") == tmp_path / "home" / ".local" / "state" / "diffkiln" / "receipts"
