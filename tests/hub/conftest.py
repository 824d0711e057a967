"""The Hub's stand-in, with huggingface_hub turned to it for one test, and bundles to put on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundle import making
from tests.hub.server import WRITER, Server

# How huggingface_hub 2.4 itself calls httpx2 for an upload.
UPLOAD_WARNING = "ignore:Use 'content=:DeprecationWarning"
REPO = "me/small"
V3, V4 = "cpu-x86-64-v3", "cpu-x86-64-v4"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A Hub without repositories; the user is logged in as one who may write. Waiting between attempts is short."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with Server() as server:
        own = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hf-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses.json"),
        }
        for name, value in own.items():
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield server
        close_session()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "bundle"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With made-up engines for two targets."""
    making.make_for(tmp_path / "bundle", (V3, V4))
    return tmp_path / "bundle"


@pytest.fixture
def published(hub: Server, bundle: Path) -> str:
    """The bundle's commit in REPO, where it has not come by `push`."""
    return hub.publish(REPO, contents(bundle))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its name there."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
