"""A family of another distribution, found by its entry point: compiled and drawn as its own pipeline draws."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln import plugins
from diffkiln.errors import Incompatible, SourceError, SpecError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.architectures import architectures
from diffkiln.record.patches import of_fixed_length
from tests.coverage.calls import CALLS
from tests.pipelines import WARNING_FILTERS
from tests.pipelines.tokenizers import WORDS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

LENGTH = 64


@pytest.fixture
def installed(monkeypatch):
    """The distribution in tests/plugins/family is installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "plugins" / "family")
    plugins.plugins.cache_clear()
    yield plugins.plugins("families")["own"]
    plugins.plugins.cache_clear()
    for name in ("own_family", "own_family.pipeline"):
        sys.modules.pop(name, None)


def saved(folder):
    """A model of the distribution's pipeline, and the pipeline."""
    from own_family.pipeline import OwnPipeline

    with quiet_libraries():
        pipe = OwnPipeline(**CALLS["pixart_sigma"].build().components)
        pipe.save_pretrained(folder, safe_serialization=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spec_of(folder):
    inputs = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.5}
    call = {"max_sequence_length": LENGTH, "use_resolution_binning": False, "clean_caption": False}
    return {
        "spec_version": 1,
        "source": {"model": str(folder)},
        "target": {"device": "cpu"},
        "inputs": inputs | {"call": call},
    }


def test_is_named_with_its_distribution(installed):
    assert (installed.distribution, installed.version) == ("own-family", "1.0")


def test_draws_as_its_pipeline_for_prompts_of_every_length(installed, tmp_path):
    reference = saved(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe, quiet_libraries():
        for count in (1, 20, 90):
            prompts = {"prompt": " ".join((WORDS * 5)[-count:]), "negative_prompt": "red"}
            want, got = (
                each(**given, **prompts, generator=torch.Generator().manual_seed(5), output_type="pt").images
                for each in (reference, pipe)
            )
            assert float((want - got).abs().max()) <= 1e-5
    assert of_fixed_length(reference, given) == {"transformer"}


def test_its_pipeline_is_none_where_it_is_not_installed(installed, tmp_path):
    saved(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [place for place in sys.path if not place.endswith("plugins/family")])
        plugins.plugins.cache_clear()
        with pytest.raises(SourceError, match="has no class 'OwnPipeline'"):
            diffkiln.check(spec_of(tmp_path / "model"))


def test_its_bundle_does_not_run_as_diffusers(installed, tmp_path):
    saved(tmp_path / "model")
    built = diffkiln.compile(spec_of(tmp_path / "model"), tmp_path / "bundle")
    with pytest.raises(Incompatible, match="OwnPipeline: neither the installed diffusers nor transformers"):
        diffkiln.load(built.path, as_diffusers=True)


def test_its_architectures_are_known_by_name(installed):
    assert architectures()["own-1.0"].pipeline == "OwnPipeline"


def test_two_families_do_not_share_an_architecture(installed, monkeypatch):
    both = dict(plugins.plugins("families")) | {"another": installed}
    monkeypatch.setattr("diffkiln.models.architectures.plugins", lambda kind: both)
    with pytest.raises(SpecError, match=r"two families have the architecture 'own-1\.0', and own is one"):
        architectures()
