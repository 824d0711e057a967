"""Receipts of engines that were tested here."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diffkiln.bundle import Tried, open_bundle
from tests.bundle.making import ENGINE, make, make_for

MACHINE = {"cpu": "a CPU", "torch": "2.13.0"}


def receipts_of(path: Path, machine: dict[str, str] = MACHINE) -> Tried:
    with open_bundle(path) as bundle:
        return Tried(bundle.verify(), machine)


def receipts(state_home: Path) -> Path:
    return state_home / "diffkiln" / "tried"


def test_an_engine_is_tested_once_its_receipt_is_there(made: Path, state_home: Path) -> None:
    assert not receipts_of(made).has(ENGINE)
    receipts_of(made).note(ENGINE)
    assert receipts_of(made).has(ENGINE)
    (receipt,) = receipts(state_home).iterdir()
    assert receipt.stat().st_mode & 0o777 == 0o600
    assert receipts(state_home).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"torch": "2.13.1"}, {"package": "1.0"}])
def test_another_machine_or_library_tests_again(made: Path, change: dict[str, str]) -> None:
    receipts_of(made).note(ENGINE)
    assert not receipts_of(made, MACHINE | change).has(ENGINE)


def test_another_bundle_or_another_engine_tests_again(made: Path) -> None:
    receipts_of(made).note(ENGINE)
    assert not receipts_of(made).has(f"{ENGINE}/inner")
    make(made, extra=b"more", force=True)
    assert not receipts_of(made).has(ENGINE)


def test_two_targets_of_one_bundle_have_receipts_of_their_own(output: Path) -> None:
    make_for(output, ("cpu-a", "cpu-b"))
    receipts_of(output).note("engines/cpu-a/transformer/Block")
    assert receipts_of(output).has("engines/cpu-a/transformer/Block")
    assert not receipts_of(output).has("engines/cpu-b/transformer/Block")


def test_receipts_that_others_could_have_written_count_for_nothing(
    made: Path, state_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receipts_of(made).note(ENGINE)
    receipts(state_home).chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert not receipts_of(made).has(ENGINE)
    assert "chmod 700" in caplog.text
    receipts(state_home).chmod(0o700)
    (receipt,) = receipts(state_home).iterdir()
    receipt.rename(receipt.with_name("aside"))
    receipt.symlink_to("aside")
    assert not receipts_of(made).has(ENGINE)


def test_a_state_directory_that_cannot_be_written_only_costs_a_test(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with caplog.at_level(logging.INFO):
        receipts_of(made).note(ENGINE)
        assert not receipts_of(made).has(ENGINE)
    assert "the next load" in caplog.text
