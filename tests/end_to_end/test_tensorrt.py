"""A bundle for an RTX 4090, made without one: what is in it, what it computes, and what this machine is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import IllegalPlan, Incompatible
from diffkiln.program import module_from_json
from diffkiln.runtime.engines.onnx.engine import OnnxEngine
from diffkiln.runtime.opening import read_constants
from diffkiln.runtime.self_test import self_test
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

GPU = "nvidia-rtx-4090"
BLOCKS = {"name": "compile", "component": "transformer", "backend": "tensorrt", "scope": "blocks"}
HELD = {"name": "compile", "component": "text_encoder", "backend": "tensorrt", "weights": "engine"}


def spec(*passes: dict, **changed: object) -> dict:
    data = json.loads((DIGITS / "spec.json").read_text())
    return data | {"target": {"device": "cuda", "gpu": "rtx 4090"}, "passes": list(passes)} | changed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tensorrt") / "bundle"
    made = spec(BLOCKS, HELD | {"weight_budget_gb": 0.0001})
    return diffkiln.compile(made, output, base=DIGITS, cache=engine_cache()).path


def test_says_which_gpu_library_and_version_its_engines_are_for(bundle):
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    assert manifest.runtime["device"] == "cuda"
    row = manifest.runtime["gpus"][GPU]
    assert (row["sm"], row["exact"], list(row["packages"])) == ("sm_89", True, ["tensorrt-rtx"])
    assert {row.backend for row in manifest.engines} == {"tensorrt"}
    files = [file for file in manifest.files if file.path.startswith("engines/")]
    assert {file.role for file in files} == {"native"}
    assert {Path(file.path).name for file in files} == {"engine.trt", "engine.onnx", "engine.json", "layers.json"}


def test_models_that_the_engines_were_built_from_give_what_the_regions_give(bundle):
    with open_bundle(bundle) as opened:
        rows, verified = opened.manifest.engines, opened.verify()
        constants = read_constants(verified)
        verified.close()
    for row in rows:
        module = module_from_json(json.loads((bundle / f"programs/{row.component}.json").read_text()))
        run = OnnxEngine(bundle / row.path, row.inputs)
        assert self_test(run, module.regions[row.region], constants, torch.device("cpu"), row.path) < 1e-4


def test_weights_that_an_engine_holds_are_not_brought_in_again(bundle):
    with open_bundle(bundle) as opened:
        groups = {name: [group.name for group in rows] for name, rows in opened.manifest.weights.items()}
        (row,) = [row for row in opened.manifest.engines if row.component == "text_encoder"]
    told = json.loads((bundle / row.path / "engine.json").read_text())
    assert told["holds_weights"]
    assert told["weight_budget"] == 100_000
    assert groups["text_encoder"] == ["unused"]
    assert "rest" in groups["transformer"]


def test_machine_without_the_gpu_is_told_in_one_sentence(bundle, monkeypatch):
    monkeypatch.setattr("diffkiln.runtime.targets.capability", lambda: None)
    with pytest.raises(Incompatible, match=rf"gpu: found none .*, required {GPU} \(sm_89\)") as caught:
        diffkiln.load(bundle)
    assert "\n" not in str(caught.value)


def test_other_gpu_is_told_that_the_engines_are_for_one_alone(bundle, monkeypatch):
    monkeypatch.setattr("diffkiln.runtime.targets.capability", lambda: (9, 0))
    with pytest.raises(Incompatible, match="gpu: found sm_90, required sm_89"):
        diffkiln.load(bundle)


def test_targets_are_not_added_to_a_bundle_whose_engines_hold_weights(bundle, tmp_path):
    with pytest.raises(IllegalPlan, match=r"engines of text_encoder hold weights.*Compile the spec"):
        diffkiln.add_target(bundle, "nvidia-rtx-5090", tmp_path / "more", cache=engine_cache())


def test_engines_that_hold_weights_leave_nothing_to_replay():
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[0\]\.weights: the weights are in the engines"):
        diffkiln.check(spec(HELD, runtime={"on_incompatible": "eager"}), base=DIGITS)
