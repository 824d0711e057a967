"""The ready specs: legal for all of their targets, and what stays on a GPU fits into it. From configuration alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import diffkiln
from diffkiln.passes.layers import linear_layers
from diffkiln.passes.manager import nbytes
from diffkiln.spec import as_tuple, parse_spec, resolve_targets

SPECS = sorted((Path(__file__).parents[2] / "examples" / "specs").glob("*.json"))

#: The Hub's models, and the architectures that have their configurations.
ARCHITECTURES = {
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl-base-1.0",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-t2v-a14b",
    "Qwen/Qwen-Image": "qwen-image",
}
#: Of a GPU's memory, what may be weights: the rest is for what a step computes, CUDA and the allocator.
FOR_WEIGHTS = 0.8


def read(path: Path) -> dict:
    """The spec with the configuration that is here in the place of the Hub's model."""
    data = json.loads(path.read_text())
    source = data["source"]
    data["source"] = {"architecture": ARCHITECTURES[source["model"]], "seed": 0, "dtype": source["dtype"]}
    return data


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_legal_and_its_weights_fit_its_gpus(path, monkeypatch):
    monkeypatch.setattr(
        "diffkiln.exporters.aot_inductor.check.cuda_problems", lambda: iter(())
    )  # as with a torch that has CUDA
    data = read(path)
    assert any(entry["name"] == "compile" for entry in data["passes"]), "a ready spec has its blocks compiled"
    checked = diffkiln.check(data)
    if "runtime" not in data:
        held = sum(checked.bytes_after.values())
        assert all(held <= FOR_WEIGHTS * (target.memory_bytes or 0) for target in checked.targets), held


@pytest.mark.parametrize("path", [path for path in SPECS if "24gb" in path.stem], ids=lambda path: path.stem)
def test_a_small_gpu_holds_no_large_layers_that_are_not_quantized(path, monkeypatch):
    """A pattern such as `*norm*` leaves out the modulations too: 27 % of the weights of FLUX's transformer."""
    monkeypatch.setattr("diffkiln.exporters.aot_inductor.check.cuda_problems", lambda: iter(()))
    module = diffkiln.check(read(path)).state.modules["transformer"]
    left = sum(layer.weight.numel() * layer.weight.itemsize for layer in linear_layers(module).values())
    assert left <= 0.05 * nbytes(module)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_names_a_commit(path):
    source = parse_spec(path).source
    assert re.fullmatch("[0-9a-f]{40}", source.revision or "")


def test_every_model_has_three_targets():
    targets: dict[str, set[str]] = {}
    for path in SPECS:
        spec = parse_spec(path)
        model = re.split(r"[.\d-]", path.stem)[0]
        targets.setdefault(model, set()).update(target.name for target in resolve_targets(spec))
        assert len(as_tuple(spec.target)) == len(set(as_tuple(spec.target)))
    assert {model for model, names in targets.items() if len(names) >= 3} == {"flux", "sdxl", "wan", "qwen"}
