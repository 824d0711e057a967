"""What is compiled when the bundle is loaded, out of the caches in it: the scheduler's arithmetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import diffkiln
from diffkiln.errors import NativeCodeRefused
from tests.conftest import DIGITS
from tests.end_to_end.processes import PROMPT, SEED, draw, off_by
from tests.exporters.regions import engine_cache


@pytest.fixture(scope="module")
def spec() -> dict:
    made = json.loads((DIGITS / "spec.json").read_text())
    return made | {"passes": [{"name": "compile", "component": "scheduler", "backend": "torch_compile"}]}


@pytest.fixture(scope="module")
def bundle(spec, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("jit") / "bundle"
    return diffkiln.compile(spec, output, base=DIGITS, cache=engine_cache()).path


def test_fresh_process_draws_what_diffusers_draws_and_compiles_nothing(spec, bundle, production, tmp_path):
    log, programs = tmp_path / "calls", tmp_path / "programs"
    programs.mkdir()
    wrapper = programs / "g++"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("g++")} "$@"\n')
    wrapper.chmod(0o755)
    told = draw(
        {"bundle": bundle, "requests": [[PROMPT, SEED]], "out": tmp_path / "found.npy"},
        production | {"PATH": f"{programs}:/usr/bin:/bin"},
    )
    assert {"diffusers", "transformers"}.isdisjoint(told["modules"])
    # Inductor asks the compiler for its version, and no more.
    assert [call for call in log.read_text().splitlines() if "version" not in call] == []
    assert off_by(spec, np.load(tmp_path / "found.npy")) <= 1e-4


def test_strangers_bundle_needs_leave(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(NativeCodeRefused, match="caches/"):
        diffkiln.load(bundle)
