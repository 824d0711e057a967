"""An environment that holds the runtime's eight dependencies, and nothing else, loads and runs a bundle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.processes import draw

DEPENDENCIES = {"torch", "numpy", "safetensors", "tokenizers", "pillow", "pydantic", "click", "rich"}


def _required(name: str) -> set[str]:
    """What a distribution demands without any extra, by canonical names."""
    found = set()
    for line in metadata.requires(name) or ():
        requirement, _, marker = line.partition(";")
        if "extra" in marker or "win32" in marker or "Windows" in marker or "python_version <" in marker:
            continue
        found.add(re.split(r"[\s<>=!~\[(]", requirement.strip())[0].lower().replace("_", "-"))
    return found


def _closure(names: set[str]) -> set[str]:
    done: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        done.add(name)
        try:
            waiting |= _required(name) - done
        except metadata.PackageNotFoundError:
            done.discard(name)  # for another platform
    return done


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """A virtual environment with links to the installed files of the eight, of what they demand, and to diffkiln."""
    home = tmp_path_factory.mktemp("runtime") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    for name in _closure(DEPENDENCIES):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")}
        for top in tops - {"__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "diffkiln").symlink_to(Path(__file__).parents[2] / "diffkiln")
    return str(home / "bin" / "python")


def test_the_plain_install_asks_for_the_eight():
    assert _required("diffkiln") == DEPENDENCIES


def test_bundle_draws_the_same_there(python, digits_bundle, production, tmp_path):
    job = {"bundle": digits_bundle, "requests": [["a handwritten three", 5]]}
    draw(job | {"out": tmp_path / "here.npy"}, production)
    told = draw(job | {"out": tmp_path / "there.npy"}, production, python)
    np.testing.assert_array_equal(np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy"))
    assert {"diffusers", "transformers", "huggingface_hub", "filelock"} & set(told["modules"]) <= {"filelock"}


def test_commands_of_the_compiler_say_what_to_install(python, tmp_path):
    command = [python, "-m", "diffkiln", "compile", "spec.json", "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "pip install 'diffkiln[compile]'" in done.stderr
    assert "Traceback" not in done.stderr
