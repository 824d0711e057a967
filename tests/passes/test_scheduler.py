"""scheduler: another one, or another configuration, in the program and in what as_diffusers builds."""

from __future__ import annotations

import json

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.passes.test_cache_schedule import draw, eager, spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def with_scheduler(root, family: str, **options) -> dict:
    return spec(root, family) | {"passes": [{"name": "scheduler", **options}]}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sdxl", {"type": "EulerDiscreteScheduler", "config": {"timestep_spacing": "trailing"}}),
        ("sdxl", {"type": "LCMScheduler", "config": {"original_inference_steps": 12}}),
        ("sd", {"type": "DPMSolverMultistepScheduler", "config": {"use_karras_sigmas": True}}),
        ("flux", {"config": {"shift": 3.0, "use_dynamic_shifting": False}}),
    ],
    ids=["Euler", "LCM", "DPM++", "shift"],
)
def test_the_bundle_runs_as_diffusers_with_that_scheduler(family, options, families, tmp_path):
    import diffusers

    made = with_scheduler(families, family, **options)
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    kind = getattr(diffusers, options.get("type", type(pipe.scheduler).__name__))
    plain = draw(pipe, made)
    with portable():
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options["config"])
    wanted = draw(pipe, made)
    assert not torch.equal(wanted, plain)
    with diffkiln.load(built.path) as compiled:
        assert torch.equal(draw(compiled, made), wanted)
    with quiet_libraries(), portable():
        again = diffkiln.load(built.path, as_diffusers=True)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is kind
    assert torch.equal(draw(again, made), wanted)


def test_the_number_of_steps_is_the_new_schedulers(families):
    made = with_scheduler(families, "sd", type="EulerDiscreteScheduler")
    made["passes"].append({"name": "cache_schedule", "component": "unet", "method": "mask", "steps": [1, 0] * 3})
    assert diffkiln.check(made).state.steps == (6,)
    del made["passes"][0]
    with pytest.raises(IllegalPlan, match="names 6 steps, and unet is called in 7"):
        diffkiln.check(made)


def test_nothing_in_the_loop_waits_for_a_value(families, tmp_path):
    """All that the schedule decides is a constant: the program of a step has no operation that reads one."""
    made = with_scheduler(families, "sdxl", type="DPMSolverMultistepScheduler")
    built = diffkiln.compile(made, tmp_path / "bundle")
    (path,) = (built.path / "programs").glob("*steps.json")
    names = {op["name"] for op in json.loads(path.read_text())["programs"]["call"]["ops"] if "name" in op}
    assert not names & {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default"}


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"type": "EulerScheduler"}, "$.passes[0].type", "EulerDiscreteScheduler"),
        ({"type": "FlowMatchEulerDiscreteScheduler"}, "$.passes[0].type", "not a scheduler that can take the place"),
        ({"config": {"timestep_spaceing": "trailing"}}, "$.passes[0].config.timestep_spaceing", "timestep_spacing"),
        ({"config": {"beta_schedule": "none"}}, "$.passes[0].config", "diffusers refuses them"),
        ({}, "$.passes[0]", "would have no effect"),
    ],
    ids=["a near name", "another kind", "a near option", "a wrong value", "no change"],
)
def test_what_does_not_fit_is_refused_by_path(options, where, reason, families):
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(with_scheduler(families, "sdxl", **options))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert reason in str(caught.value)


def test_it_is_for_the_scheduler_alone(families):
    with pytest.raises(SpecError, match=r"\$\.passes\[0\]\.component"):
        diffkiln.check(with_scheduler(families, "sdxl", component="unet", type="EulerDiscreteScheduler"))
