"""guidance: every batch, and every step that is left out, against diffusers' own pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.compiler.compile import check
from diffkiln.errors import IllegalPlan, Incompatible, PassError, SpecError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.passes.base import Fact
from diffkiln.passes.caching import every
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from tests.exporters.regions import engine_cache
from tests.passes import plans
from tests.passes.caching import definitions
from tests.passes.caching.definitions import Run
from tests.passes.test_cache_schedule import STEPS, draw, eager, spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
GUIDED = [1, 1, 0, 1, 0, 0]
MASK = every(STEPS, 2)
FORA = {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}


def made_of(root: Path, family: str, options: dict[str, Any], *more: dict[str, Any], steps: int = STEPS) -> Any:
    """A spec whose run calls the denoiser in so many steps."""
    made = spec(root, family)
    component = "unet" if family.startswith("sd") and family != "sd3" else "transformer"
    made["passes"] = [{"name": "guidance", "component": component, **options}, *more]
    made["inputs"]["num_inference_steps"] = steps - (family == "sd")  # PNDM takes one more
    if family == "flux":
        made["inputs"]["call"]["true_cfg_scale"] = 3.0
    return made


def called(pipe: Any) -> list[str]:
    """The denoiser's programs in the order of its calls."""
    (variant,) = pipe.variants
    ops = [op.attrs for op in variant.programs["call+negative"].ops if op.name == "call"]
    return [attrs["program"] for attrs in ops if attrs["component"] in ("unet", "transformer")]


@contextmanager
def once(pipe: Any, lanes: int) -> Iterator[None]:
    """In steps that are not guided the prompt stands for both: the first of two calls, or a batch's second half."""
    net = getattr(pipe, "unet", None) or pipe.transformer
    original, given = net.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, lane = divmod(len(given), lanes)
        given.append(given[-1] if lane and not GUIDED[step] else original(*args, **kwargs))
        if lanes == 2 or GUIDED[step]:
            return given[-1]
        (result,) = given[-1]
        return (torch.cat([result.chunk(2)[1]] * 2),)

    net.forward = forward
    try:
        yield
    finally:
        net.forward = original


#: Of the negative prompt: what is one constant for both halves becomes another for each.
SIZES = {f"negative_{name}": [32, 0] for name in ("original_size", "crops_coords_top_left", "target_size")}

#: family → batch, keywords that the call fixes, the denoiser's program
BATCHES = {
    "qwen_image": ("doubled", {}, "transformer.doubled"),
    "sdxl": ("halved", SIZES, "unet.halved"),
}


@pytest.mark.parametrize("family", BATCHES)
def test_another_batch_gives_the_same_images(family, families, tmp_path):
    batch, call, program = BATCHES[family]
    made = made_of(families, family, {"batch": batch}, steps=2)
    made["inputs"]["call"] |= call
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    with diffkiln.load(built.path) as compiled:
        for texts in ({"negative_prompt": "blurred"}, {"prompt": "Snow on a long road", "negative_prompt": "a hat"}):
            wanted, found = draw(pipe, made, **texts), draw(compiled, made, **texts)
            assert float((found - wanted).abs().max()) <= 1e-5
        assert set(called(compiled)) == {program}


#: family → options beside the steps, the calls of a step in diffusers, the denoiser's programs
UNGUIDED = {
    "flux": ({}, 2, "transformer", STEPS + sum(GUIDED)),
    "wan": ({"batch": "doubled"}, 2, "transformer transformer.doubled", STEPS),
    "sd": ({"batch": "halved"}, 1, "unet.halved", STEPS + sum(GUIDED)),
    "sd3": ({}, 1, "transformer transformer.halved", STEPS),
    "cogvideox": ({}, 1, "transformer transformer.halved", STEPS),
}


@pytest.mark.parametrize("family", UNGUIDED)
def test_a_step_without_guidance_is_the_prompts_alone(family, families, tmp_path):
    options, lanes, programs, calls = UNGUIDED[family]
    made = made_of(families, family, {"steps": GUIDED, **options})
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    plain = draw(pipe, made, negative_prompt="blurred")
    with once(pipe, lanes):
        wanted = draw(pipe, made, negative_prompt="blurred")
    with diffkiln.load(built.path) as compiled:
        found = draw(compiled, made, negative_prompt="blurred")
        assert set(called(compiled)) == set(programs.split())
        assert len(called(compiled)) == calls
    assert float((found - wanted).abs().max()) <= 2e-5
    assert float((found - plain).abs().max()) > 1e-3
    assert any("the bundle cannot be loaded with as_diffusers" in notice for notice in built.notices)
    with pytest.raises(Incompatible, match=r"diffusers guides .* in every step"):
        diffkiln.load(built.path, as_diffusers=True)


#: family → batch, calls of a step in diffusers
SCHEDULED = {"flux": ("doubled", 2), "sd3": ("halved", 1)}


@pytest.mark.parametrize("family", SCHEDULED)
def test_a_schedule_counts_the_calls_that_it_leaves(family, families, tmp_path):
    batch, lanes = SCHEDULED[family]
    made = made_of(families, family, {"batch": batch}, FORA)
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    with definitions.blocks(Run(pipe.transformer, MASK, lanes=lanes)):
        wanted = draw(pipe, made, negative_prompt="blurred")
    with diffkiln.load(built.path) as compiled:
        assert float((draw(compiled, made, negative_prompt="blurred") - wanted).abs().max()) <= 2e-5
        kept, reused = f"transformer.{batch}.keeping", f"transformer.{batch}.reusing"
        assert set(called(compiled)) == {kept, reused}


def test_a_schedule_after_it_keeps_each_lane(families, tmp_path):
    mask = [1, 0, 1, 0, 1, 0]
    schedule = {"name": "cache_schedule", "component": "transformer", "method": "fora", "steps": mask}
    made = made_of(families, "flux", {"steps": [1, 1, 1, 1, 0, 0]}, schedule)
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    net = pipe.transformer
    with definitions.blocks(Run(net, list(map(bool, mask)), lanes=2)):
        counted, calls = net.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            step, lane = divmod(len(calls), 2)
            result = counted(*args, **kwargs)
            calls.append(calls[-1] if lane and step >= 4 else result)
            return calls[-1]

        net.forward = forward
        wanted = draw(pipe, made, negative_prompt="blurred")
        net.forward = counted
    with diffkiln.load(built.path) as compiled:
        assert float((draw(compiled, made, negative_prompt="blurred") - wanted).abs().max()) <= 2e-5


def test_engines_are_for_the_doubled_batch_and_do_not_fit_diffusers(families, tmp_path):
    made = made_of(families, "wan", {"batch": "doubled"}, {"name": "compile", "component": "transformer"}, steps=2)
    made["runtime"] = {"offload": {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}}
    built = diffkiln.compile(made, tmp_path / "bundle", cache=engine_cache())
    assert any("for another batch than diffusers calls it with" in notice for notice in built.notices)
    (row,) = json.loads((built.path / "manifest.json").read_text())["engines"]
    assert row["inputs"][0]["shape"][0] == 2
    pipe = eager(made)
    with diffkiln.load(built.path) as compiled:
        for scale in (made["inputs"]["guidance_scale"], 3.0):
            more = {"negative_prompt": "blurred", "guidance_scale": scale}
            assert float((draw(compiled, made, **more) - draw(pipe, made, **more)).abs().max()) <= 2e-5
    with pytest.raises(Incompatible, match="for the batch that guidance has there"):
        diffkiln.load(built.path, as_diffusers=True)


@cache
def recorded(root: Path, family: str) -> Recording:
    made = made_of(root, family, {"steps": [1, 0]}, steps=2)
    checked = check(made)
    with quiet_libraries():
        return record(checked.pipe, checked.requests, Constants())


#: (family, options, the reason that is given)
REFUSED = [
    ("flux", {"batch": "halved"}, "a step calls transformer twice already"),
    ("pixart_sigma", {"batch": "doubled"}, "no step calls transformer twice: it is guided by a doubled batch already"),
    ("pixart_sigma", {"batch": "halved", "steps": [1, 0]}, "the call does not mark the ends of its steps"),
    ("pixart_sigma", {"steps": [1, 0, 1]}, "names 3 steps, and transformer is called in 2"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSED)
def test_what_the_program_does_not_allow_is_refused(family, options, reason, families):
    steps = plans.placed({"name": "guidance", "component": "transformer", **options})
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: guidance failed") as caught:
        manager.rewrite(recorded(families, family), steps)
    assert reason in str(caught.value)


#: name → (family, options, keywords of inputs, where, reason)
WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "nothing": ("flux", {}, {}, "$.passes[0].steps", "neither steps nor a batch"),
    "no such batch": ("flux", {"batch": "tripled"}, {}, "$.passes[0].batch", "doubled"),
    "every step beside a batch": ("flux", {"batch": "doubled", "steps": [1] * 6}, {}, "$.passes[0].steps", "Remove"),
    "no step beside a batch": ("flux", {"batch": "doubled", "steps": [0] * 6}, {}, "$.passes[0].batch", "no step is"),
    "other steps": ("flux", {"steps": [1, 0]}, {}, "$.passes[0].steps", "names 2 steps, and transformer is called in"),
    "no effect": ("flux", {"steps": [1] * 6}, {}, "$.passes[0]", "would have no effect"),
    "no denoiser": ("flux", {"batch": "doubled", "component": "vae"}, {}, "$.passes[0]", "not a part of the denoising"),
    "distilled": ("flux", {"batch": "doubled"}, {"call": {}}, "$.passes[0]", "is distilled: it is given the guidance"),
    "scale of 1": ("sd", {"batch": "halved"}, {"guidance_scale": 1.0}, "$.passes[0]", "which turns guidance off"),
    "true scale of 1": (
        "qwen_image", {"batch": "doubled"}, {"call": {"true_cfg_scale": 1.0}}, "$.passes[0]", "true_cfg_scale is at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_path(name, families):
    family, options, inputs, where, reason = WRONG[name]
    made = made_of(families, family, options)
    made["inputs"] |= inputs
    with pytest.raises((SpecError, IllegalPlan)) as caught:
        diffkiln.check(made)
    assert where in [problem.where for problem in caught.value.problems]
    assert reason in str(caught.value)


def test_a_schedule_that_diffusers_decides_cannot_follow(families):
    dynamic = {"name": "cache_schedule", "component": "transformer", "method": "first_block", "threshold": 0.1}
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[1\]\.dynamic: guidance rewrites the program"):
        diffkiln.check(made_of(families, "flux", {"batch": "doubled"}, {**dynamic, "dynamic": True}))


def test_a_consistency_distillation_is_recognised():
    plan = plans.ghost("sd")
    plan.modules["unet"].register_to_config(time_cond_proj_dim=256)
    (item,) = plans.placed({"name": "guidance", "component": "unet", "batch": "halved"})
    (problem,) = item.step.check(plan, plans.CPU, "$.passes[0]")
    assert "is distilled: it is given the guidance scale (time_cond_proj_dim)" in problem.reason


def test_activations_with_one_scale_for_the_batch_keep_their_batch():
    plan = plans.ghost("wan").with_facts([Fact("scaled_together", "transformer")])
    (item,) = plans.placed({"name": "guidance", "component": "transformer", "batch": "doubled"})
    (problem,) = item.step.check(plan, plans.CPU, "$.passes[0]")
    assert (problem.where, problem.hint) == ("$.passes[0].batch", 'Quantize with "granularity": "per_row".')
