"""Three backends in one bundle: text encoder and VAE by ONNX Runtime, denoiser by AOTInductor, the rest replayed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import diffkiln
from diffkiln.errors import NativeCodeRefused
from tests.conftest import DIGITS
from tests.end_to_end.processes import PROMPT, SEED, draw, off_by
from tests.exporters.regions import engine_cache
from tests.forking import served


@pytest.fixture(scope="module")
def spec() -> dict:
    made = json.loads((DIGITS / "spec.json").read_text())
    more = [{"name": "compile", "component": name, "backend": "onnx"} for name in ("text_encoder", "vae")]
    return made | {"passes": [*made["passes"], *more]}


@pytest.fixture(scope="module")
def bundle(spec, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mixed") / "bundle"
    return diffkiln.compile(spec, output, base=DIGITS, cache=engine_cache()).path


def test_bundle_has_both_backends_and_keeps_weights_apart(bundle):
    with diffkiln.load(bundle) as pipe:
        rows = pipe.bundle.manifest.engines
        backends = {row.component: row.backend for row in rows}
        assert backends == {"text_encoder": "onnx", "transformer": "aot_inductor", "vae": "onnx"}
        assert {row.region for row in rows if row.backend == "onnx"} == {"text_encoder", "vae.decode"}
        assert pipe.bundle.manifest.requires.packages == {"onnxruntime": ">=1.31"}
        models = [row for row in pipe.bundle.manifest.files if row.path.endswith(".onnx")]
        assert {row.role for row in models} == {"native"}
        weights = sum(row.size for row in pipe.bundle.manifest.files if row.role == "weights")
        assert sum(row.size for row in models) < weights / 10


def test_fresh_process_draws_what_diffusers_draws(spec, bundle, production, tmp_path):
    here = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    told = draw({"bundle": bundle, "requests": [[PROMPT, SEED]], "out": tmp_path / "found.npy"}, production | here)
    assert {"onnxruntime"} <= set(told["modules"])
    assert {"onnx", "onnxscript", "diffusers", "transformers"}.isdisjoint(told["modules"])
    assert told["engine_calls"] >= 2 + 4 * 8
    assert told["processes"] == []
    assert off_by(spec, np.load(tmp_path / "found.npy")) <= 1e-4


def test_strangers_bundle_needs_leave(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(NativeCodeRefused, match=r"engine\.onnx"):
        diffkiln.load(bundle)


def test_forked_children_make_sessions_of_their_own(bundle):
    """ONNX Runtime's threads are the parent's, and a child that used its session would wait for them."""
    rows = served(bundle, "called")
    assert len({row[0] for row in rows}) == 3
    assert len({digest for row in rows for digest in row[1:3]}) == 1
