"""hoist on a text encoder: what it makes of fixed prompts is a table; with all of them fixed it leaves the bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.ledger import _replayed
from diffkiln.errors import CallError, IllegalPlan, Incompatible, PassError, SpecError
from diffkiln.evaluate.calls import call_of, keywords_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.runtime.variants import CompiledVariant
from diffkiln.serving.offer import _alike
from tests.passes.hoisting.replays import PROMPT, Recorded, recorded
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
ENCODER = {"name": "hoist", "component": "text_encoder"}
NEGATIVE = {"negative_prompt": "blurred, grey"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def sd(folders) -> Recorded:
    return recorded("sd", folders, guidance_scale=5.0)


def _calls_of(recording: Any, component: str) -> int:
    call = recording.calls[0]["call"]
    return sum(op.name == "call" and op.attrs["component"] == component for op in call.ops)


def test_the_empty_negative_prompt_becomes_a_table(sd):
    found = sd.rewritten(ENCODER)
    assert (_calls_of(sd.recording, "text_encoder"), _calls_of(found, "text_encoder")) == (2, 1)
    assert torch.equal(sd.draws(found), sd.draws(sd.recording))


def test_a_negative_prompt_of_the_spec_is_the_callers_no_more(folders):
    made = recorded("sd", folders, guidance_scale=5.0, fixed_prompts=NEGATIVE)
    assert set(made.recording.calls[0]) == {"call", "call+latents"}
    found = made.rewritten(ENCODER)
    assert _calls_of(found, "text_encoder") == 1
    assert torch.equal(made.draws(found), made.draws(made.recording))


def test_where_every_prompt_comes_with_the_request_it_is_an_error(folders):
    made = recorded("sd", folders, guidance_scale=1.0)
    with pytest.raises(PassError, match=r"every call of text_encoder takes a prompt.*fixed_prompts"):
        made.rewritten(ENCODER)


@pytest.fixture(scope="module")
def bundle(sd, tmp_path_factory):
    """A bundle whose prompts are all fixed, and one of the same call, in which the empty negative prompt is a table."""
    root = tmp_path_factory.mktemp("bundles")
    inputs = sd.spec["inputs"] | {"fixed_prompts": {"prompt": PROMPT, **NEGATIVE}}
    fixed = sd.spec | {"inputs": inputs, "passes": [ENCODER]}
    given = sd.spec | {"passes": [ENCODER]}
    return [diffkiln.compile(spec, root / name).path for name, spec in (("fixed", fixed), ("given", given))]


def _drawn(pipe: Any, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True) if hasattr(pipe, "set_progress_bar_config") else None
    return pipe(generator=torch.Generator().manual_seed(3), output_type="np", **given).images


def test_the_encoder_leaves_a_bundle_whose_prompts_are_all_fixed(bundle):
    with open_bundle(bundle[0]) as opened:
        manifest = opened.manifest
    assert "text_encoder" not in manifest.weights
    assert not [row for row in manifest.files if "text_encoder" in row.path and row.role in ("weights", "program")]
    with diffkiln.load(bundle[0]) as fixed, diffkiln.load(bundle[1]) as given:
        expected = _drawn(given, prompt=PROMPT, **NEGATIVE)
        assert np.array_equal(_drawn(fixed), expected)
        assert np.array_equal(_drawn(fixed, prompt=PROMPT, **NEGATIVE), expected)  # the same texts may be given


def test_another_prompt_than_the_fixed_one_is_refused(bundle):
    with (
        diffkiln.load(bundle[0]) as pipe,
        pytest.raises(CallError, match=r"prompt: .*compiled with 'a quiet.*Leave it"),
    ):
        _drawn(pipe, prompt="another")


def test_diffusers_has_no_encoder_then(bundle):
    with pytest.raises(Incompatible, match="keep_originals"), quiet_libraries():
        diffkiln.load(bundle[0], as_diffusers=True)


WRONG = {
    "'eta' is no prompt": {"fixed_prompts": {"eta": "0"}},
    'Did you mean "negative_prompt"': {"fixed_prompts": {"negativ_prompt": "x"}},
    "is a fixed prompt, too": {"fixed_prompts": {"prompt": "x"}, "call": {"prompt": "y"}},
    "has no keyword 'prompt_3'": {"fixed_prompts": {"prompt_3": "x"}},
    "tensors are given in the place of prompt": {
        "fixed_prompts": {"prompt": "x"},
        "call": {"prompt_embeds": {"shape": [1, 77, 32]}},
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_fixed_prompt_is_refused(words, sd):
    with pytest.raises(SpecError, match=words):
        diffkiln.check(sd.spec | {"inputs": sd.spec["inputs"] | WRONG[words]})


def test_what_draws_its_own_prompts_is_refused_beside_a_fixed_one(sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house\n")
    spec = sd.spec | {"inputs": sd.spec["inputs"] | {"fixed_prompts": {"prompt": "x"}}}
    gate = {"metric": "psnr", "at_least": 20, "prompts": str(prompts)}
    with pytest.raises(SpecError, match="inputs fix the prompt"):
        diffkiln.check(spec | {"quality": [gate]})
    passes = [
        {"name": "calibrate", "component": "unet", "prompts": str(prompts), "computed": 2},
        {"name": "cache_schedule", "component": "unet", "method": "mask", "steps": "calibrated"},
    ]
    with pytest.raises(IllegalPlan, match="calibrate draws others"):
        diffkiln.check(spec | {"passes": passes})


def test_an_adapter_of_an_encoder_with_tables_is_refused(bundle, sd, tmp_path):
    """Its tables would stay as they are: the encoder's layers are still read, for the prompts that requests bring."""
    weight = next(name for name in sd.weights["text_encoder"] if name.endswith("layers.0.self_attn.q_proj.weight"))
    shape, stem = sd.weights["text_encoder"][weight].shape, "text_encoder." + weight.removesuffix(".weight")
    file = tmp_path / "a.safetensors"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, shape[1]), f"{stem}.lora_B.weight": torch.ones(shape[0], 2)}
    safetensors.torch.save_file(factors, file)
    with (
        diffkiln.load(bundle[1]) as pipe,
        pytest.raises(CallError, match=r"the pass hoist comes before a\.safetensors"),
    ):
        pipe.load_lora(file)


def test_requests_share_a_call_beside_a_fixed_prompt(sd):
    """A variant for two prompts has the fixed one twice, and that alone is no difference."""
    programs = sd.recording.calls[0]
    first, larger, other = (
        CompiledVariant("v", {**sd.recording.fixed[0], "negative_prompt": texts}, programs)
        for texts in ("grey", ["grey", "grey"], ["grey", "blue"])
    )
    assert _alike(larger, first)
    assert not _alike(other, first)


def test_the_ledger_replays_without_an_encoder_that_has_left(folders):
    """The tables of a component that nothing calls any more are computed all the same."""
    encoder = {"name": "hoist", "component": "text_encoder_2"}
    prompts = {"prompt_2": "a red fox", "negative_prompt": "grey"}
    made = recorded("sdxl", folders, encoder, fixed_prompts=prompts)
    with quiet_libraries():
        hoisted, plain = (_replayed(made.plan, chosen) for chosen in (made.plan.listed, ()))
        assert np.array_equal(*(_drawn(pipe, prompt=PROMPT) for pipe in (hoisted, plain)))
    calls = [op.attrs["component"] for op in hoisted.variants[0].programs["call"].ops if op.name == "call"]
    assert "text_encoder_2" not in calls
    assert "text_encoder" in calls


def test_what_a_bundle_is_compared_with_is_given_its_fixed_prompts(bundle):
    with open_bundle(bundle[0]) as opened:
        call = call_of(opened)
    assert call.texts == ()
    given = keywords_of(call, ["another prompt"], [0])
    assert (given["prompt"], given["negative_prompt"]) == (PROMPT, NEGATIVE["negative_prompt"])
