"""The same spec gives the same bundle on whatever x86-64 CPU it is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffkiln.bundle import open_bundle
from tests.end_to_end.test_families import spec_of
from tests.portable import disguises

#: Sigmas of NumPy, rotary tables of a text encoder and a denoiser, positions that are sines.
FAMILIES = ("sdxl", "lumina2", "pixart_sigma")
KARRAS = {"name": "scheduler", "type": "DPMSolverMultistepScheduler", "config": {"use_karras_sigmas": True}}


def built(specs: dict, out: Path, changed: dict[str, str]) -> Path:
    """Where a process with these variables builds the specs, without what the tests' own arithmetic asks for."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"} | changed
    job = json.dumps({"specs": specs, "out": str(out)})
    command = [sys.executable, str(Path(__file__).with_name("build.py")), job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: spec_of(name, root) for name in FAMILIES}
    return made | {"karras": made["sdxl"] | {"passes": [KARRAS]}}


@pytest.fixture(scope="module")
def here(specs, tmp_path_factory):
    return built(specs, tmp_path_factory.mktemp("here"), {})


@pytest.mark.parametrize("name", disguises())
@pytest.mark.parametrize("threads", [1, pytest.param(4, marks=pytest.mark.more)])
def test_another_cpu_builds_the_same_bundle(name, threads, specs, here, tmp_path):
    there = built(specs, tmp_path, disguises()[name] | {"OMP_NUM_THREADS": str(threads)})
    for each in specs:
        with open_bundle(here / each) as first, open_bundle(there / each) as again:
            assert again.manifest == first.manifest, each  # what differs, if anything does
            assert again.id == first.id
