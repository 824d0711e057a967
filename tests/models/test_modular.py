"""Modular pipelines as sources: in the shape of ordinary ones, with the keywords that their blocks have."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import SourceError, SpecError
from diffkiln.interpreter.modular import as_ordinary, ordinary_of, original_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.opening import open_source
from diffkiln.spec import Source
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import reference_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]
INPUTS = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5}
INPUTS |= {"call": {"max_sequence_length": 32}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A modular FLUX, as its own `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("modular") / "flux"
    with quiet_libraries():
        CALLS["flux_modular"].build().save_pretrained(str(folder))
    return folder


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def spec_of(model: Path, **inputs):
    spec = {"spec_version": 1, "source": {"model": str(model)}, "target": {"device": "cpu"}}
    return spec | {"inputs": INPUTS | inputs}


def drawn(pipe, **given):
    return pipe(
        prompt="a small red fox",
        num_inference_steps=2,
        height=64,
        width=64,
        guidance_scale=3.5,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **given,
    )


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    return diffkiln.compile(spec_of(folder), tmp_path_factory.mktemp("bundles") / "flux").path


@pytest.fixture(scope="module")
def wanted(folder):
    with quiet_libraries():
        pipe = reference_of(folder)
    return drawn(pipe, output="images")


def test_a_bundle_of_a_modular_pipeline_draws_what_its_blocks_draw(bundle, wanted):
    with diffkiln.load(bundle) as pipe:
        found = drawn(pipe).images
    assert float((found - wanted).abs().max()) < 1e-5


def test_as_diffusers_it_is_the_modular_pipeline(bundle, wanted):
    pipe = diffkiln.load(bundle, as_diffusers=True)
    assert isinstance(pipe, diffusers.FluxModularPipeline)
    assert float((drawn(pipe, output="images") - wanted).abs().max()) < 1e-5
    assert original_of(ordinary_of(pipe)) is pipe
    assert ordinary_of(pipe).transformer is pipe.transformer


def test_the_index_of_a_bundle_is_an_ordinary_one(bundle):
    index = json.loads((bundle / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxModularPipeline"
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]


def test_an_ordinary_folder_is_compiled_as_a_modular_pipeline(tmp_path, wanted):
    with quiet_libraries():
        CALLS["flux"].build().save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    spec["source"]["pipeline"] = "FluxModularPipeline"
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe:
        found = drawn(pipe).images
    assert found.shape == wanted.shape
    assert pipe.class_name == "FluxModularPipeline"


def test_its_call_has_the_inputs_of_its_blocks(folder):
    kind = open_source(Source(model=str(folder)), Path()).pipeline_class
    assert kind is as_ordinary(diffusers.FluxModularPipeline, {})
    inputs = {item.name for item in diffusers.FluxModularPipeline().blocks.inputs}
    assert set(inspect.signature(kind.__call__).parameters) == {"self", "output", *inputs}


def test_a_keyword_that_no_block_has_is_refused(folder):
    with pytest.raises(SpecError, match="no keyword 'true_cfg'"):
        diffkiln.check(spec_of(folder, call={"true_cfg": 1.0}))


def test_components_of_another_model_are_to_be_given(broken):
    index = broken / "modular_model_index.json"
    content = json.loads(index.read_text())
    content["text_encoder"][2]["pretrained_model_name_or_path"] = "owner/flux"
    index.write_text(json.dumps(content))
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(SourceError, match=r'"components": \{"text_encoder"'):
        open_source(Source(model=str(broken)), Path())


def test_what_was_not_saved_is_named_by_what_the_blocks_want(broken):
    """As a repository has it whose components are loaded one by one."""
    index = broken / "modular_model_index.json"
    content = json.loads(index.read_text())
    library, name, origin = content["transformer"]
    content["transformer"] = [None, None, origin | {"type_hint": [library, name]}]
    index.write_text(json.dumps(content))
    assert open_source(Source(model=str(broken)), Path()).entry("transformer") == [library, name]


def test_other_results_are_asked_for_by_name(folder, tmp_path):
    """As `output` of the pipeline's own call."""
    spec = spec_of(folder, call={"max_sequence_length": 32, "output": ["images", "latents"]})
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe:
        found = drawn(pipe)
    with quiet_libraries():
        wanted = drawn(reference_of(folder), output=["images", "latents"])
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4)
