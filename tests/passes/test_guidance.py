"""guidance: steps without it, against the pipeline whose second call gives what the first gave."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, PassError
from tests.passes.caching import definitions
from tests.passes.caching.definitions import Run
from tests.passes.test_cache_schedule import STEPS, draw, eager, spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
GUIDED = [1, 1, 0, 1, 0, 0]


def made_of(root, family: str, *more: dict[str, Any], **options: Any) -> dict[str, Any]:
    made = spec(root, family)
    made["passes"] = [{"name": "guidance", "component": "transformer", "steps": GUIDED, **options}, *more]
    if family == "flux":
        made["inputs"]["call"]["true_cfg_scale"] = 3.0
    return made


@contextmanager
def once(net: torch.nn.Module):
    """In a step that is not guided the second call gives what the first gave."""
    original, given = net.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, lane = divmod(len(given), 2)
        given.append(given[-1] if lane and not GUIDED[step] else original(*args, **kwargs))
        return given[-1]

    net.forward = forward
    try:
        yield
    finally:
        del net.forward


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_step_without_guidance_is_the_call_with_the_prompt(family, families, tmp_path):
    made = made_of(families, family)
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    plain = draw(pipe, made, negative_prompt="blurred")
    with once(pipe.transformer):
        wanted = draw(pipe, made, negative_prompt="blurred")
    with diffkiln.load(built.path) as compiled:
        found = draw(compiled, made, negative_prompt="blurred")
        (variant,) = compiled.variants
        names = [op.attrs.get("component") for op in variant.programs["call+negative"].ops]
    assert names.count("transformer") == STEPS + sum(GUIDED)
    assert float((found - wanted).abs().max()) <= 2e-5
    assert float((found - plain).abs().max()) > 1e-3


def test_a_schedule_after_it_keeps_each_lane(families, tmp_path):
    mask = [1, 0, 1, 0, 1, 0]
    schedule = {"name": "cache_schedule", "component": "transformer", "method": "fora", "steps": mask}
    made = made_of(families, "flux", schedule, steps=[1, 1, 1, 1, 0, 0])
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


def test_a_doubled_batch_is_told(families, tmp_path):
    made = spec(families, "sdxl")
    made["passes"] = [{"name": "guidance", "component": "unet", "steps": GUIDED}]
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: guidance failed: .*no step calls unet twice"):
        diffkiln.compile(made, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"steps": [1, 0]}, "$.passes[0].steps", "names 2 steps, and transformer is called in 6"),
        ({"steps": [1] * 6}, "$.passes[0]", "would have no effect"),
        ({"component": "vae"}, "$.passes[0]", "no part of the denoising run"),
    ],
)
def test_what_does_not_fit_is_refused_by_path(options, where, reason, families):
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(made_of(families, "flux", **options))
    assert where in [problem.where for problem in caught.value.problems]
    assert reason in str(caught.value)
