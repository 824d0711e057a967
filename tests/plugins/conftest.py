"""Plug-ins in distributions of their own, installed into folders that only these tests have on Python's path."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffkiln import plugins
from diffkiln.passes import registry

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def backend_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `diffkiln-replay` is installed in, without a network."""
    room = tmp_path_factory.mktemp("distribution")
    shutil.copytree(HERE / "backend", room / "source")  # where setuptools leaves files behind
    how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *how, "--target", str(room / "site"), str(room / "source")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return room / "site"


@pytest.fixture(scope="module")
def backend(backend_distribution: Path) -> Iterator[Path]:
    """The same, found by this process as long as a module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(backend_distribution))
        _look_again()
        yield backend_distribution
    _look_again()


def _look_again() -> None:
    importlib.invalidate_caches()
    plugins.plugins.cache_clear()
    registry.pass_classes.cache_clear()
