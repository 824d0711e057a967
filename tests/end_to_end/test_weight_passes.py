"""Every pass that changes weights on the digits pipeline: saved, loaded in a fresh process, compared with eager.

Eager is diffusers' pipeline with the very module that the passes leave, so what the bundle adds or loses would show.
"""

from __future__ import annotations

import json
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.interpreter.layers.scaled import rows_are_scaled
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from tests.conftest import DIGITS
from tests.end_to_end.processes import run
from tests.end_to_end.test_families import spec_of
from tests.models.test_gguf import write
from tests.passes.adapters import adapter

REQUESTS = [("a handwritten seven", 7), ("the digit 4", 3)]
CALL = {"height": 32, "width": 32, "num_inference_steps": 8, "guidance_scale": 1.0, "max_sequence_length": 16}


def entry(name: str, component: str = "transformer", **options: Any) -> dict[str, Any]:
    return {"name": name, "component": component, **options}


def torchao(kind: str, **options: Any) -> dict[str, Any]:
    return entry("quantize", type=kind, **options)


def bitsandbytes(kind: str, **options: Any) -> dict[str, Any]:
    return entry("quantize", backend="bitsandbytes", type=kind, **options)


PASSES: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "fuse_lora": [entry("fuse_lora", adapters=[{"file": "adapter.safetensors", "scale": 0.3}])],
    "cast": [
        entry("cast", component, dtype="bfloat16")
        for component in ("text_encoder", "text_encoder_2", "transformer", "vae")
    ],
    "fuse_qkv": [entry("fuse_qkv")],
    "prune": [entry("prune", blocks=["single_transformer_blocks.1"])],
    "int8_weight_only": [torchao("int8_weight_only")],
    "int8_dynamic": [torchao("int8_dynamic")],
    "int4_weight_only": [torchao("int4_weight_only", group_size=32, exclude=["*norm*"])],
    "float8_weight_only": [torchao("float8_weight_only")],
    "float8_dynamic_row": [torchao("float8_dynamic")],
    "float8_dynamic_tensor": [torchao("float8_dynamic", granularity="per_tensor")],
    "bnb_int8": [bitsandbytes("int8")],
    "nf4": [bitsandbytes("nf4")],
    "nf4_double": [bitsandbytes("nf4", double_quant=True)],
    "fp4": [bitsandbytes("fp4")],
    "quanto": [entry("quantize", backend="quanto", type="int8")],
    "layerwise_cast": [entry("layerwise_cast")],
    "channels_last": [entry("channels_last", "vae")],
    "gguf": [],
    "mixed": [
        entry("fuse_qkv"),
        bitsandbytes("nf4", include=["single_transformer_blocks.*"]),
        torchao("int8_weight_only"),
        entry("quantize", "text_encoder_2", backend="quanto", type="int8"),
        entry("layerwise_cast", "vae"),
    ],
}

if not rows_are_scaled():  # refused, then
    del PASSES["float8_dynamic_row"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The adapter and the GGUF file that specs name."""
    root = tmp_path_factory.mktemp("files")
    transformer = _load().transformer
    adapter(root / "adapter.safetensors", transformer, "transformer", ending="to_k")
    write(root / "model.gguf", transformer.state_dict())
    return root


@cache
def _load() -> Any:
    sys.path.insert(0, str(DIGITS))
    try:
        import evaluate_eager

        return evaluate_eager.load()
    finally:
        sys.path.remove(str(DIGITS))


def spec(name: str, files: Path) -> dict[str, Any]:
    passes = json.loads(json.dumps(PASSES[name]).replace("adapter.safetensors", str(files / "adapter.safetensors")))
    more = {"gguf": {"transformer": str(files / "model.gguf")}} if name == "gguf" else {}
    return {
        "spec_version": 1,
        "source": {"model": "model", "dtype": "float32", **more},
        "target": {"device": "cpu"},
        "inputs": {**{key: CALL[key] for key in list(CALL)[:4]}, "call": {"max_sequence_length": 16}},
        "passes": passes,
    }


@pytest.fixture(scope="module")
def bundles(files, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: diffkiln.compile(spec(name, files), root / name, base=DIGITS).path for name in PASSES}


@pytest.fixture(scope="module")
def drawn(bundles, tmp_path_factory) -> dict[str, np.ndarray]:
    """Images by a fresh process that has neither diffusers nor what quantized the weights."""
    out = tmp_path_factory.mktemp("images")
    imported = run("draw_all.py", {"bundles": bundles, "requests": REQUESTS, "out": out})
    foreign = {"diffusers", "transformers", "torchao", "bitsandbytes", "optimum", "gguf", "peft", "accelerate"}
    assert foreign.isdisjoint(imported)
    return {name: np.load(out / f"{name}.npy") for name in bundles}


@pytest.fixture(scope="module")
def drawn_by_diffusers(bundles, tmp_path_factory) -> dict[str, np.ndarray]:
    """Images by a fresh process that loads the bundles as diffusers pipelines."""
    out = tmp_path_factory.mktemp("images-diffusers")
    job = {"bundles": bundles, "requests": REQUESTS, "out": out, "load": {"as_diffusers": True}, "call": CALL}
    run("draw_all.py", job)
    return {name: np.load(out / f"{name}.npy") for name in bundles}


@cache
def _eager(name: str, files: Path) -> np.ndarray:
    """What diffusers draws with the modules that the passes leave."""
    from diffkiln.models.meta import load_module

    checked = diffkiln.check(spec(name, files), base=DIGITS)
    pipe = _load()
    before = dict(pipe.components)
    for component in {"transformer", *(item.step.component for item in checked.listed)}:
        module = load_module(checked.source, component, "float32")
        manager.apply(module, component, checked.listed)
        setattr(pipe, component, module)
    try:
        images = [
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **CALL).images
            for prompt, seed in REQUESTS
        ]
    finally:
        for component, module in before.items():
            setattr(pipe, component, module)
    return np.concatenate(images)


def headers(file: Path) -> dict[str, int]:
    """The tensors of a safetensors file and their bytes."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        table = json.loads(opened.read(length))
    return {name: row["data_offsets"][1] - row["data_offsets"][0] for name, row in table.items() if name[0] != "_"}


@pytest.mark.parametrize("name", PASSES)
def test_a_fresh_process_draws_what_eager_draws(name, drawn, files):
    assert np.abs(drawn[name] - _eager(name, files)).max() <= 2 / 255


@pytest.mark.parametrize("name", PASSES)
def test_so_does_the_bundle_as_a_diffusers_pipeline(name, drawn_by_diffusers, files):
    assert np.abs(drawn_by_diffusers[name] - _eager(name, files)).max() <= 2 / 255


@pytest.mark.parametrize("name", PASSES)
def test_the_bundles_weights_are_the_transformed_ones(name, bundles, files):
    """Names, shapes and types are those that the passes leave, and their bytes are what `check` predicts."""
    checked = diffkiln.check(spec(name, files), base=DIGITS)
    manifest = json.loads((bundles[name] / "manifest.json").read_text())
    for component, module in checked.state.modules.items():
        held: dict[str, Any] = {}
        for row in manifest["weights"][component]:
            held |= headers(bundles[name] / row["file"])
        planned = {key: tensor.numel() * tensor.itemsize for key, tensor in weights_of(module)}
        assert held == planned
        on_disk = sum((bundles[name] / row["file"]).stat().st_size for row in manifest["weights"][component])
        stored = sum(row["bytes"] for row in manifest["weights"][component])
        assert stored == checked.bytes_after[component]
        headers_only = on_disk - stored
        assert abs(stored - checked.bytes_after[component]) <= 0.01 * stored
        assert headers_only <= 200 * len(held) + 100 * len(manifest["weights"][component])
        if name in ("fuse_qkv", "mixed") and component == "transformer":
            assert not any(".to_q." in key or ".to_k." in key or ".to_v." in key for key in held)


def test_a_reader_that_knows_no_layouts_is_told(bundles):
    """It would take [N, H, W, C] for [N, C, H, W]."""
    needs = {
        name: json.loads((path / "manifest.json").read_text())["features_required"] for name, path in bundles.items()
    }
    assert {name for name, features in needs.items() if features} == {"channels_last"}
    assert needs["channels_last"] == ["channels_last"]


def test_a_quantized_bundle_is_not_quantized_again(drawn, bundles):
    """The runtime process imported nothing that could quantize; the weights are of the quantized types."""
    assert drawn.keys() == bundles.keys()
    manifest = json.loads((bundles["nf4"] / "manifest.json").read_text())
    rows = manifest["weights"]["transformer"]
    kinds = {
        key.rpartition("_")[2] for row in rows for key in headers(bundles["nf4"] / row["file"]) if "weight_" in key
    }
    assert {"data", "table", "absmax"} <= kinds


def test_two_specs_in_one_process_do_not_influence_each_other(bundles, files, tmp_path):
    """Compiled once more, after all the others, the first ones have the ids that they had."""
    for name in ("plain", "int8_weight_only"):
        again = diffkiln.compile(spec(name, files), tmp_path / name, base=DIGITS)
        assert (bundles[name] / "manifest.sha256").read_text().split()[0] == again.id


@pytest.mark.more
def test_a_unet_with_merged_tokens_in_a_fresh_process(tmp_path):
    """The digits have no UNet; a small Stable Diffusion has."""
    given = spec_of("sd", tmp_path / "model")
    given["passes"] = [entry("merge_tokens", "unet"), entry("channels_last", "unet"), entry("channels_last", "vae")]
    bundle = diffkiln.compile(given, tmp_path / "bundle").path
    run("draw_all.py", {"bundles": {"sd": bundle}, "requests": REQUESTS, "out": tmp_path})
    as_diffusers = {"bundles": {"pipe": bundle}, "requests": REQUESTS, "out": tmp_path, "load": {"as_diffusers": True}}
    inputs = given["inputs"]
    call = {**{key: value for key, value in inputs.items() if key != "call"}, **inputs.get("call", {})}
    run("draw_all.py", as_diffusers | {"call": call})
    drawn, again = np.load(tmp_path / "sd.npy"), np.load(tmp_path / "pipe.npy")
    assert np.abs(drawn - again).max() <= 2 / 255
    plain = diffkiln.compile({**given, "passes": []}, tmp_path / "plain").path
    run("draw_all.py", {"bundles": {"plain": plain}, "requests": REQUESTS, "out": tmp_path})
    assert np.abs(drawn - np.load(tmp_path / "plain.npy")).max() > 2 / 255, "merging changes the image"
