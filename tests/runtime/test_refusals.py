"""What a call asks for and a bundle lacks: which program serves it all the same, and what is said where none does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import CallError
from diffkiln.interpreter.quiet import quiet_libraries
from tests.conftest import DIGITS
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS
from tests.portably import as_recorded

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture(scope="module")
def spec(families):
    """Stable Diffusion without guidance, and with it."""
    made = spec_of("sd", families)
    one = made["inputs"]
    without = one | {"guidance_scale": 0.0, "num_inference_steps": 2}
    return made | {"inputs": [without, one | {"guidance_scale": 7.5, "num_inference_steps": 3}]}


@pytest.fixture(scope="module")
def pipe(spec, tmp_path_factory):
    built = diffkiln.compile(spec, tmp_path_factory.mktemp("bundle") / "sd")
    with diffkiln.load(built.path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def eager(spec):
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        loaded = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    loaded.set_progress_bar_config(disable=True)
    one = {key: value for key, value in spec["inputs"][0].items() if key != "call"} | spec["inputs"][0]["call"]

    def call(*args: Any, **keywords: Any) -> Any:
        with quiet_libraries(), torch.inference_mode():
            return loaded(*args, **one | keywords)

    return call


def drawn(call: Any, **keywords: Any) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(5)
    with as_recorded():
        return call("A red Fox", output_type="pt", generator=generator, **keywords).images


@pytest.mark.parametrize("scale", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_of_at_most_one_is_the_program_without_guidance(pipe, eager, scale) -> None:
    want, got = drawn(eager, guidance_scale=scale), drawn(pipe, guidance_scale=scale, num_inference_steps=2)
    assert float((want - got).abs().max()) <= 1e-5


def test_other_guidance_finds_the_variant_that_has_it(pipe, eager) -> None:
    want, got = (drawn(call, guidance_scale=3.0, num_inference_steps=3) for call in (eager, pipe))
    assert float((want - got).abs().max()) <= 1e-5


@pytest.mark.parametrize("scale", [1.5, -1.0, True])
def test_guidance_that_is_another_program_is_refused_and_says_what_to_write(pipe, scale) -> None:
    with pytest.raises(CallError, match="guidance_scale"):
        pipe("a", guidance_scale=scale, num_inference_steps=2)


def test_guidance_that_nothing_reads_may_be_any(tmp_path) -> None:
    """A FLUX that was distilled for one scale."""
    made = json.loads((DIGITS / "spec.json").read_text()) | {"passes": [], "runtime": {}}
    made["inputs"] |= {"num_inference_steps": 1}
    built = diffkiln.compile(made, tmp_path / "flux", base=DIGITS)
    with diffkiln.load(built.path) as flux:
        images = [drawn(flux, guidance_scale=scale) for scale in (1.0, 0.0, 30.0)]
    assert all(torch.equal(images[0], other) for other in images)


def test_a_misspelt_keyword_is_refused_without_a_value_too(pipe) -> None:
    with pytest.raises(CallError, match=r"negativ_prompt: .* was not compiled with this keyword"):
        pipe("a", negativ_prompt=None)


@pytest.mark.parametrize("keyword", ["negativ_prompt", "negative_promt", "Negative_Prompt"])
def test_a_misspelt_keyword_gets_a_suggestion(pipe, keyword) -> None:
    with pytest.raises(CallError, match=rf'{keyword}: .*Did you mean "negative_prompt"\?'):
        pipe("a", **{keyword: "blurred"})


@pytest.mark.parametrize(
    ("keyword", "meant"), [("generater", "generator"), ("guidence_scale", "guidance_scale"), ("heigth", "height")]
)
def test_other_keywords_are_suggested_too(pipe, keyword, meant) -> None:
    with pytest.raises(CallError, match=f'Did you mean "{meant}"'):
        pipe("a", **{keyword: 1})


def test_a_prompt_that_no_program_reads_is_refused(pipe) -> None:
    """diffusers would raise a TypeError: Stable Diffusion has one prompt."""
    with pytest.raises(CallError, match=r"prompt_2: .* was not compiled with this keyword"):
        pipe("a", prompt_2="b")


@pytest.mark.parametrize("generator", [7, "7", [7], [], 7.0, [torch.Generator(), None]])
def test_a_seed_is_no_generator_and_the_error_says_how_to_make_one(pipe, generator) -> None:
    with pytest.raises(CallError, match=r'generator: .*torch\.Generator\("cpu"\)\.manual_seed\(7\)'):
        pipe("a", generator=generator)


@pytest.mark.parametrize(
    ("keywords", "written"),
    [
        ({"height": 512}, r'no variant was compiled for height=512\. .*"inputs": \{…, "height": 512\}'),
        ({"eta": 0.5}, r'for eta=0\.5\. .*"inputs": \{…, "call": \{"eta": 0\.5\}\}'),
        ({"height": 512, "clip_skip": 1}, r'"height": 512, "call": \{"clip_skip": 1\}'),
        ({"timesteps": list(range(900))}, r"a variant with timesteps in `inputs` \(`call`\)"),
        ({"num_inference_steps": 2, "guidance_scale": 3.0}, r'"guidance_scale": 3\.0'),
    ],
)
def test_the_error_says_what_differs_and_what_to_write(pipe, keywords, written) -> None:
    with pytest.raises(CallError, match=rf"(?s){written}"):
        pipe("a", **keywords)


def test_the_number_of_prompts_is_the_batch_size(pipe) -> None:
    with pytest.raises(CallError, match=r'(?s)for batch of prompts 3\. .*"inputs": \{…, "batch_size": 3\}'):
        pipe(["a", "b", "c"])


def test_what_each_variant_has_alone_is_told_from_what_none_has(pipe) -> None:
    """2 steps are compiled, and guidance is, and not both."""
    with pytest.raises(CallError, match=r"was compiled for guidance_scale=3\.0 with num_inference_steps=2\."):
        pipe("a", num_inference_steps=2, guidance_scale=3.0)
    with pytest.raises(CallError, match="turns guidance off"):
        pipe("a", num_inference_steps=3, guidance_scale=0.0)


def test_a_variant_of_sigmas_is_named_for_their_number(families, tmp_path) -> None:
    made = spec_of("flux", families)
    made["inputs"]["call"] |= {"sigmas": [1.0, 0.6, 0.3]}
    built = diffkiln.compile(made, tmp_path / "flux")
    with diffkiln.load(built.path) as flux:
        assert [variant.name.split("x")[-1].split("-", 1)[1] for variant in flux.variants] == ["3-steps"]
        assert flux("a").images


def test_a_call_after_close_says_so(spec, tmp_path) -> None:
    loaded = diffkiln.load(diffkiln.compile(spec | {"inputs": spec["inputs"][0]}, tmp_path / "sd").path)
    assert loaded("a").images
    loaded.close()
    for _ in range(2):
        with pytest.raises(CallError, match=r"this pipeline is closed\. Load the bundle again"):
            loaded("a")
    loaded.close()
    with pytest.raises(CallError, match="is closed"):
        loaded("a", timeout=0)
