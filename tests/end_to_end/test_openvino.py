"""The digits by OpenVINO: text encoder and VAE hold their weights, the transformer's blocks take the bundle's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import IllegalPlan, NativeCodeRefused
from tests.conftest import DIGITS
from tests.end_to_end.processes import PROMPT, SEED, draw, off_by
from tests.exporters.regions import engine_cache
from tests.forking import served
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

OPENVINO = {"name": "compile", "backend": "openvino"}


@pytest.fixture(scope="module")
def spec() -> dict:
    made = json.loads((DIGITS / "spec.json").read_text())
    passes = [entry for entry in made["passes"] if entry["name"] != "compile"]
    passes += [OPENVINO | {"component": name} for name in ("text_encoder", "vae")]
    return made | {"passes": [*passes, OPENVINO | {"component": "transformer", "scope": "blocks"}]}


@pytest.fixture(scope="module")
def bundle(spec, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("openvino") / "bundle"
    return diffkiln.compile(spec, output, base=DIGITS, cache=engine_cache()).path


def test_weights_are_in_the_engines_of_whole_components_alone(bundle):
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
    assert {row.backend for row in manifest.engines} == {"openvino"}
    groups = {name: [group.name for group in rows] for name, rows in manifest.weights.items()}
    assert groups["text_encoder"] == ["unused"]
    assert "rest" in groups["transformer"]
    sizes = {row.path.split("/")[2]: row.size for row in manifest.files if row.path.endswith("engine.bin")}
    assert sizes["text_encoder"] > 100_000 > sizes["transformer"]
    assert {row.role for row in manifest.files if row.path.startswith("engines/")} == {"native"}


def test_fresh_process_draws_what_diffusers_draws(spec, bundle, production, tmp_path):
    here = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    told = draw({"bundle": bundle, "requests": [[PROMPT, SEED]], "out": tmp_path / "found.npy"}, production | here)
    assert {"openvino"} <= set(told["modules"])
    assert {"onnx", "openvino_telemetry", "diffusers", "transformers"}.isdisjoint(told["modules"])
    assert told["processes"] == []
    assert off_by(spec, np.load(tmp_path / "found.npy")) <= 1e-5


def test_a_process_without_openvino_says_what_to_install(bundle):
    script = f"""
from importlib import metadata
version = metadata.version
def missing(name):
    if name == "openvino":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = missing
import diffkiln
try:
    diffkiln.load({str(bundle)!r}, allow_native=True)
except diffkiln.errors.MissingDependency as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "openvino: found nothing, required ==" in done.stdout
    assert "pip install openvino" in done.stdout


def test_strangers_bundle_needs_leave(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(NativeCodeRefused, match=r"engine\.bin"):
        diffkiln.load(bundle)


def test_forked_children_compile_their_own(bundle):
    rows = served(bundle, "called")
    assert len({row[0] for row in rows}) == 3
    assert len({digest for row in rows for digest in row[1:3]}) == 1


def test_engines_that_hold_weights_leave_nothing_to_replay(spec):
    with pytest.raises(IllegalPlan, match=r"\.weights: the weights are in the engine"):
        diffkiln.check(spec | {"runtime": {"on_incompatible": "eager"}}, base=DIGITS)


def _unet() -> tuple[torch.nn.Module, dict]:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    states = torch.randn(2, 7, 8)
    return module, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(5), "encoder_hidden_states": states}


def _decoder() -> tuple[torch.nn.Module, dict]:
    from diffusers.models.autoencoders.vae import Decoder

    module = Decoder(
        in_channels=4, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return module, {"sample": torch.randn(1, 4, 8, 8)}


@pytest.mark.more
@pytest.mark.parametrize("make", [_unet, _decoder])
def test_whole_models_of_other_kinds_give_what_they_gave(make):
    torch.manual_seed(0)
    module, kwargs = make()
    module.requires_grad_(False).eval()
    options = {"scope": "whole", "backend": "openvino", "options": {"weights": "engine"}, "cache": engine_cache()}
    built = diffkiln.compile_module(module, kwargs, **options)
    with torch.inference_mode():
        wanted, found = (call(**kwargs) for call in (module, built))
    wanted, found = (value if isinstance(value, torch.Tensor) else value["sample"] for value in (wanted, found))
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
