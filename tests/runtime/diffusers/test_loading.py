"""A bundle as the original pipeline: its class, its results, its offloading."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import CallError, DigestMismatch, Incompatible, IntegrityError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import Input, Program, Ref, TensorType
from diffkiln.record import patches
from diffkiln.runtime.diffusers.building import build
from diffkiln.runtime.engine_blocks import EngineBlock, Mismatch, arguments
from tests.conftest import DIGITS
from tests.end_to_end.processes import draw
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
CALL = {"height": 32, "width": 32, "num_inference_steps": 8, "guidance_scale": 1.0, "max_sequence_length": 16}


def image(pipe, **changed):
    generator = torch.Generator("cpu").manual_seed(7)
    return pipe("a handwritten seven", generator=generator, output_type="np", **CALL | changed).images


@pytest.fixture(scope="module")
def eager():
    from diffusers import FluxPipeline

    with quiet_libraries():
        pipe = FluxPipeline.from_pretrained(DIGITS / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return image(pipe)


@pytest.fixture(scope="module")
def loaded(digits_bundle):
    pipe = diffkiln.load(digits_bundle, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_fresh_process_offloaded_to_disk_equals_eager(digits_bundle, production, tmp_path, eager):
    job = {"bundle": digits_bundle, "requests": [["a handwritten seven", 7]], "out": tmp_path / "out.npy"}
    told = draw(job | {"load": {"as_diffusers": True}, "call": CALL}, production)
    assert told["class"] == "FluxPipeline"
    assert told["engine_calls"] >= 4 * 8
    assert np.abs(np.load(tmp_path / "out.npy") - eager).max() <= 2 / 255
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert list(Path(production[name]).rglob("*")) == []


def test_original_projections_are_gone(loaded):
    attention = loaded.transformer.transformer_blocks[0].attn
    assert attention.to_q is None
    assert attention.to_qkv.weight.shape == (3 * 96, 96)


def test_blocks_are_offloaded_to_disk_between_calls(loaded):
    """diffusers leaves empty memory in a block's place; its weights lie in a file of its component."""
    image(loaded)
    (root,) = {Path(group.safetensors_file_path).parents[1] for group in _groups(loaded)}
    for group in _groups(loaded):
        assert Path(group.safetensors_file_path).is_file()
    assert {path.name for path in root.iterdir()} == {"text_encoder", "text_encoder_2", "transformer", "vae"}


def _groups(pipe):
    hook = pipe.transformer.transformer_blocks[0]._diffusers_hook
    return [hook.get_hook("group_offloading").group]


def test_offload_folder_goes_with_the_pipeline(digits_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipe = diffkiln.load(digits_bundle, as_diffusers=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("diffkiln-offload-")]
    del pipe
    gc.collect()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("diffkiln-offload-")] == []


def test_another_size_is_refused_with_the_shapes(loaded):
    with pytest.raises(CallError, match=r"hidden_states is float32\[1,\d+,96\], compiled"):
        image(loaded, height=64, width=64)
    assert np.isfinite(image(loaded)).all()


def test_weights_of_another_type_are_refused_and_no_engine_sees_them(digits_bundle):
    """An engine reads the memory that it is given, whatever lies there."""
    pipe = diffkiln.load(digits_bundle, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    norm = pipe.transformer.transformer_blocks[0].attn.norm_q
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.float64), requires_grad=False)
    with pytest.raises(
        CallError, match=r"the weight attn\.norm_q\.weight is float64\[\d+\] by now, compiled for float32"
    ):
        image(pipe)


def test_int8_cannot_be_offloaded_to_disk_and_the_error_says_what_to_do(digits_int8_bundle):
    with pytest.raises(Incompatible, match="without offloading"):
        diffkiln.load(digits_int8_bundle, as_diffusers=True)


def test_int8_resident_draws_what_the_lean_way_draws(digits_int8_bundle, tmp_path):
    spec = json.loads((DIGITS / "spec-int8.json").read_text()) | {"runtime": {}}
    resident = diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS, cache=engine_cache()).path
    pipe = diffkiln.load(resident, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    with diffkiln.load(digits_int8_bundle) as lean:
        np.testing.assert_allclose(image(pipe), image(lean), atol=1e-5)
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    assert type(layer.weight).__name__ == "Int8Tensor"
    assert torch.isfinite(layer(torch.ones(1, layer.in_features))).all()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd"])
def test_bundle_without_engines_equals_the_pipeline_bit_for_bit(name, tmp_path):
    from diffusers import DiffusionPipeline

    spec = spec_of(name, tmp_path)
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        for part in reference.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)  # torch chooses by it whether a product folds its batch
        pipe = diffkiln.load(built.path, as_diffusers=True)
        given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
        results = []
        for each in (reference, pipe):
            each.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(3)
            results.append(each(prompt="A red Fox", generator=generator, output_type="pt", **given).images)
    assert type(pipe) is type(reference)
    assert torch.equal(*results)


def test_call_that_cannot_be_recorded_runs_as_diffusers_where_the_spec_says_so(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(patches, "known_patches", lambda: ())
    spec = spec_of("wan", tmp_path) | {"runtime": {"on_unrecordable": "diffusers"}}
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with pytest.raises(Incompatible, match="as_diffusers"):
        diffkiln.load(built.path)
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    results = []
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        for each in (reference, diffkiln.load(built.path, as_diffusers=True)):
            each.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(3)
            results.append(each(prompt="A red Fox", generator=generator, output_type="pt", **given).frames)
    assert torch.equal(*results)


def test_changed_configuration_is_found_before_anything_is_built(digits_bundle, tmp_path):
    copy = shutil.copytree(digits_bundle, tmp_path / "copy")
    file = copy / "pipeline" / "transformer" / "config.json"
    file.write_text(file.read_text().replace("8", "9", 1))
    with pytest.raises(DigestMismatch, match=r"pipeline/transformer/config.json"):
        diffkiln.load(copy, as_diffusers=True)


def test_missing_and_unknown_weights_are_named():
    from diffusers import AutoencoderKL

    folder = DIGITS / "model" / "vae"
    with quiet_libraries():
        weights = dict(AutoencoderKL.from_pretrained(folder, local_files_only=True).state_dict())
        with pytest.raises(IntegrityError, match=r"encoder\.tail"):
            build(folder, AutoencoderKL, weights | {"encoder.tail": torch.ones(1)}, [])
        del weights["decoder.conv_in.bias"]
        with pytest.raises(IntegrityError, match=r"decoder\.conv_in\.bias"):
            build(folder, AutoencoderKL, weights, [])


REGION = Program(
    "block",
    (Input("%x", TensorType("float32", (2, 3))), Input("%y", TensorType("float32", (3,)))),
    (),
    (Ref("%x"),),
    {},
    signature={"args": (Ref("%x"),), "kwargs": {"extra": (Ref("%y"), None), "flag": True}, "result": (Ref("%x"), None)},
)


def test_arguments_are_matched_by_structure_and_type():
    x, y = torch.ones(2, 3), torch.ones(3)
    assert set(arguments(REGION, (x,), {"extra": [y, None], "flag": True, "unused": None})) == {"%x", "%y"}
    for args, kwargs, reason in [
        ((x,), {"extra": [y, None], "flag": False}, "flag"),
        ((x,), {"extra": [y], "flag": True}, "2 values"),
        ((y,), {"extra": [y, None], "flag": True}, r"float32\[3\], compiled for float32\[2,3\]"),
        ((x, y), {"extra": [y, None], "flag": True}, "positional"),
        ((x,), {"extra": [y, None], "flag": True, "more": 1}, "compiled for"),
    ]:
        with pytest.raises(Mismatch, match=reason):
            arguments(REGION, args, kwargs)


def test_eager_is_the_way_out_only_where_it_is_allowed():
    block = torch.nn.Identity()
    assert EngineBlock(block, "block", [], {}, eager=True)(torch.ones(1)) == 1
    with pytest.raises(CallError):
        EngineBlock(block, "block", [], {}, eager=False)(torch.ones(1))
