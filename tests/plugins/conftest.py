"""Plug-ins in distributions of their own, installed into folders that only these tests have on Python's path."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffkiln import plugins
from diffkiln.passes import registry

HERE = Path(__file__).parent


def _installed(name: str, room: Path) -> Path:
    """The folder that a distribution of this directory is installed in, without a network."""
    shutil.copytree(HERE / name, room / "source")  # where setuptools leaves files behind
    how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *how, "--target", str(room / "site"), str(room / "source")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return room / "site"


@pytest.fixture(scope="session")
def backend_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _installed("backend", tmp_path_factory.mktemp("distribution"))


@pytest.fixture(scope="session")
def model_pass_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _installed("model_pass", tmp_path_factory.mktemp("distribution"))


@contextmanager
def found_here(site: Path) -> Iterator[None]:
    """While it lasts, this process finds what is installed in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        _look_again()
        yield
    _look_again()


@pytest.fixture(scope="module")
def backend(backend_distribution: Path) -> Iterator[Path]:
    """The backend, found by this process as long as a module's tests run."""
    with found_here(backend_distribution):
        yield backend_distribution


def _look_again() -> None:
    importlib.invalidate_caches()
    plugins.plugins.cache_clear()
    registry.pass_classes.cache_clear()
