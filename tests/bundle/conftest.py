from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundle import making


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Locks and receipts of a test stay with the test."""
    home = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home


@pytest.fixture
def output(tmp_path: Path) -> Path:
    parent = tmp_path / "here"
    parent.mkdir()
    return parent / "bundle"


@pytest.fixture
def made(output: Path) -> Path:
    making.make(output)
    return output


@pytest.fixture
def private_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where native copies go, so that a test can see that none is left."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place
