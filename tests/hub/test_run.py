"""`diffkiln run hf://…`: a branch is looked up once, and the bundle is fetched once."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffkiln.cli import main
from diffkiln.errors import HubError
from diffkiln.hub import pinned, push
from tests.hub.conftest import REPO, UPLOAD_WARNING, bundle, hub, published
from tests.hub.server import Server

__all__ = ["bundle", "hub", "published"]

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


def test_an_address_is_pinned_to_the_commit_that_it_means_now(hub: Server, published: str):
    address = f"hf://{REPO}@{published}"
    assert pinned(f"hf://{REPO}") == pinned(f"hf://{REPO}@main") == address
    hub.requests.clear()
    assert pinned(address) == address
    assert hub.requests == []


@pytest.mark.parametrize("address", ["hf://", "hf://../x", "hf://me", "hf://me/nothing", f"hf://{REPO}@nothing"])
def test_what_is_no_address_or_not_there_is_refused(hub: Server, published: str, address: str):
    with pytest.raises(HubError):
        pinned(address)


def test_run_takes_an_address(hub: Server, digits_bundle: Path, tmp_path: Path, capsys, monkeypatch):
    commit = push(digits_bundle, REPO).commit
    monkeypatch.chdir(tmp_path)
    draw = ["--prompt", "a handwritten seven", "--seed", "7", "--allow-native", "-o"]
    assert main(["run", f"hf://{REPO}", *draw, "hub.png"]) == 0
    assert f"hf://{REPO} is hf://{REPO}@{commit}" in capsys.readouterr().err
    hub.requests.clear()
    assert main(["run", f"hf://{REPO}@{commit}", *draw, "again.png"]) == 0
    assert hub.requests == []
    assert main(["run", str(digits_bundle), *draw, "local.png"]) == 0
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def test_run_says_what_is_wrong_with_an_address(hub: Server, published: str, tmp_path: Path, capsys):
    where = ["--prompt", "seven", "-o", str(tmp_path / "seven.png")]
    assert main(["run", "hf://me/nothing", *where]) == 2
    assert "me/nothing" in capsys.readouterr().err
    assert main(["run", "hf://me", *where]) == 2
    assert "Give owner/name" in capsys.readouterr().err
