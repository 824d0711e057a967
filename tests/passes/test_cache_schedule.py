"""cache_schedule: what a wrong spec is told, and every method against its definition in plain PyTorch."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, Incompatible, SpecError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes.caching import every
from diffkiln.passes.program.cache_schedule import CacheSchedule
from diffkiln.passes.registry import pass_class, read_passes
from diffkiln.passes.variants import constant
from diffkiln.spec import PassEntry
from tests.end_to_end.test_families import spec_of
from tests.passes.caching import definitions
from tests.passes.caching.definitions import Run
from tests.pipelines import WARNING_FILTERS
from tests.portably import as_recorded

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
STEPS = 6


def spec(root, family: str, component: str = "transformer", **options: Any) -> dict[str, Any]:
    made = spec_of(family, root)
    made["inputs"]["num_inference_steps"] = STEPS
    made["passes"] = [{"name": "cache_schedule", "component": component, **options}]
    return made


def keywords(made: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in made["inputs"].items() if key != "call"} | made["inputs"]["call"]
    return given | {"prompt": "A small red Fox", "output_type": "pt"}


def draw(pipe: Any, made: dict[str, Any], **more: Any) -> torch.Tensor:
    with as_recorded():  # what diffusers computes and what is folded have the same bits
        result = pipe(**keywords(made) | more, generator=torch.Generator().manual_seed(5))
    return result[next(iter(result.keys()))]


def eager(made: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    with quiet_libraries(), portable():
        pipe = DiffusionPipeline.from_pretrained(made["source"]["model"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


MASK = every(STEPS, 2)
LATE = every(STEPS, 3, 2)
#: (family, component, options, the definition, other keywords of the call)
METHODS: dict[str, tuple[str, str, dict[str, Any], Any, dict[str, Any]]] = {
    "mask": (
        "flux", "transformer", {"method": "mask", "steps": [1, 0, 1, 1, 0, 0]},
        lambda net: definitions.output(Run(net, [True, False, True, True, False, False])), {},
    ),
    "mask of blocks": (
        "sd3", "transformer", {"method": "mask", "keep": "blocks", "steps": [1, 0, 1, 1, 0, 0]},
        lambda net: definitions.blocks(Run(net, [True, False, True, True, False, False])), {},
    ),
    "fora": (
        "flux", "transformer", {"method": "fora", "interval": 2},
        lambda net: definitions.blocks(Run(net, MASK)), {},
    ),
    "fora, two calls a step": (
        "flux", "transformer", {"method": "fora", "interval": 2},
        lambda net: definitions.blocks(Run(net, MASK, lanes=2)), {"true_cfg_scale": 3.0, "negative_prompt": "blurred"},
    ),
    "fora of a UNet": (
        "sdxl", "unet", {"method": "fora", "interval": 2}, lambda net: definitions.blocks(Run(net, MASK)), {},
    ),
    "fora of a video": (
        "cogvideox", "transformer", {"method": "fora", "interval": 2},
        lambda net: definitions.blocks(Run(net, MASK)), {},
    ),
    "first_block": (
        "flux", "transformer", {"method": "first_block", "interval": 2},
        lambda net: definitions.blocks(Run(net, MASK), 1), {},
    ),
    "dbcache": (
        "flux", "transformer", {"method": "dbcache", "interval": 2, "front": 1, "back": 1},
        lambda net: definitions.blocks(Run(net, MASK), 1, 1), {},
    ),
    "taylorseer, order 0": (
        "flux", "transformer", {"method": "taylorseer", "interval": 2, "order": 0},
        lambda net: definitions.output(Run(net, MASK), 0), {},
    ),
    "taylorseer, order 1": (
        "flux", "transformer", {"method": "taylorseer", "interval": 3, "order": 1, "start": 2},
        lambda net: definitions.output(Run(net, LATE), 1), {},
    ),
    "taylorseer, order 2": (
        "flux", "transformer", {"method": "taylorseer", "interval": 2, "order": 2},
        lambda net: definitions.output(Run(net, MASK), 2), {},
    ),
    "taylorseer of a UNet": (
        "sd", "unet", {"method": "taylorseer", "steps": [1, 1, 0, 1, 0, 0], "order": 1},
        lambda net: definitions.output(Run(net, [True, True, False, True, False, False]), 1), {},
    ),
    "deepcache": (
        "sdxl", "unet", {"method": "deepcache", "interval": 2}, lambda net: definitions.deep(Run(net, MASK), 1), {},
    ),
    "deepcache, deeper": (
        "sd", "unet", {"method": "deepcache", "interval": 3, "start": 2, "depth": 2},
        lambda net: definitions.deep(Run(net, LATE), 2), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_definition(name, families, tmp_path):
    family, component, options, definition, more = METHODS[name]
    made = spec(families, family, component, **options)
    made["inputs"]["call"] |= {key: value for key, value in more.items() if "prompt" not in key}
    if family == "sd":
        made["inputs"]["num_inference_steps"] = STEPS - 1  # PNDM takes one more
    prompts = {key: value for key, value in more.items() if "prompt" in key}
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    with definition(getattr(pipe, component)):
        wanted = draw(pipe, made, **prompts)
    with nullcontext(draw(pipe, made, **prompts)) as plain, diffkiln.load(built.path) as compiled:
        found = draw(compiled, made, **prompts)
        again = draw(compiled, made, **prompts)
    assert float((found - wanted).abs().max()) <= 2e-5
    assert float((found - plain).abs().max()) > 1e-3
    assert torch.equal(found, again)


@pytest.mark.parametrize("threshold", [0.02, 0.05])
def test_magcache_is_what_diffusers_hook_computes(threshold, families, tmp_path):
    ratios = [1.0, 1.02, 0.99, 1.01, 1.03, 0.97]
    made = spec(families, "flux", method="magcache", ratios=ratios, threshold=threshold, retention=0.1)
    built = diffkiln.compile(made, tmp_path / "bundle")
    with quiet_libraries():
        hooked = diffkiln.load(built.path, as_diffusers=True)
    hooked.set_progress_bar_config(disable=True)
    with diffkiln.load(built.path) as compiled:
        assert torch.equal(draw(hooked, made), draw(compiled, made))


def test_taylorseer_is_what_diffusers_hook_computes(families, tmp_path):
    made = spec(families, "flux", method="taylorseer", interval=2, order=2)
    built = diffkiln.compile(made, tmp_path / "bundle")
    with quiet_libraries():
        hooked = diffkiln.load(built.path, as_diffusers=True)
    hooked.set_progress_bar_config(disable=True)
    with diffkiln.load(built.path) as compiled:
        assert float((draw(hooked, made) - draw(compiled, made)).abs().max()) <= 2e-5


def test_a_schedule_that_diffusers_has_no_hook_for_is_refused_there(families, tmp_path):
    built = diffkiln.compile(spec(families, "flux", method="fora", interval=2), tmp_path / "bundle")
    with pytest.raises(Incompatible, match=r"no hook that does what this schedule of transformer does \(fora\)"):
        diffkiln.load(built.path, as_diffusers=True)


@pytest.mark.parametrize("method", ["first_block", "pab"])
def test_a_dynamic_criterion_runs_in_diffusers_alone(method, families, tmp_path):
    option = {"threshold": 10.0} if method == "first_block" else {"interval": 2}
    made = spec(families, "flux", method=method, dynamic=True, **option)
    built = diffkiln.compile(made, tmp_path / "bundle")
    with pytest.raises(Incompatible, match=f"only as diffusers.*{method} decides at each step"):
        diffkiln.load(built.path)
    with quiet_libraries():
        hooked = diffkiln.load(built.path, as_diffusers=True)
    hooked.set_progress_bar_config(disable=True)
    found, plain = draw(hooked, made), draw(eager(made), made)
    assert bool(found.isfinite().all())
    assert float((found - plain).abs().max()) > 1e-3


WRONG = {
    "interval of 0": ({"method": "fora", "interval": 0}, "$.passes[0].interval", "2"),
    "no interval": ({"method": "fora"}, "$.passes[0].interval", "is needed by fora"),
    "threshold below 0": ({"method": "magcache", "ratios": [1.0] * 6, "threshold": -0.1}, "$.passes[0].threshold", "0"),
    "a ratio of 0": ({"method": "magcache", "ratios": [1.0] * 5 + [0.0]}, "$.passes[0].ratios[5]", "0"),
    "first step reuses": (
        {"method": "mask", "steps": [0, 1, 1, 1, 1, 1]},
        "$.passes[0].steps",
        "first step reuses",
    ),
    "what is no mask": ({"method": "mask", "steps": [1, 2, 0, 0, 0, 0]}, "$.passes[0].steps[1]", "0"),
    "order of 3": ({"method": "taylorseer", "interval": 2, "order": 3}, "$.passes[0].order", "2"),
    "another method's option": (
        {"method": "fora", "interval": 2, "depth": 2},
        "$.passes[0].depth",
        "fora has no option depth. It has interval, start, end, steps.",
    ),
    "both": ({"method": "fora", "interval": 2, "steps": [1] * 6}, "$.passes[0].interval", "beside steps"),
    "dynamic without being asked": ({"method": "pab", "interval": 2}, "$.passes[0].method", "at each step"),
    "no dynamic form": ({"method": "fora", "interval": 2, "dynamic": True}, "$.passes[0].dynamic", "no hook"),
    "dynamic without threshold": ({"method": "first_block", "dynamic": True}, "$.passes[0].threshold", "is missing"),
    "no such method": (
        {"method": "tailorseer"},
        "$.passes[0].method",
        "method 'tailorseer'. Did you mean \"taylorseer\"?",
    ),
    "a method like no other": (
        {"method": "x"},
        "$.passes[0].method",
        "no method 'x'. There are mask, fora, first_block,",
    ),
    "no method": ({"interval": 2}, "$.passes[0].method", "is missing"),
    "a method that is not text": ({"method": 5}, "$.passes[0].method", "must be text, not 5"),
    "dynamic that is not a boolean": (
        {"method": "pab", "interval": 2, "dynamic": 1},
        "$.passes[0].dynamic",
        "must be true or false, not 1",
    ),
    "mask without steps": ({"method": "mask"}, "$.passes[0].steps", "is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_by_path(name, families):
    options, where, reason = WRONG[name]
    with pytest.raises(SpecError) as caught:
        diffkiln.check(spec(families, "flux", **options))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert reason in str(caught.value)


ILLEGAL = {
    "mask of the wrong length": (
        "flux", "transformer", {"method": "mask", "steps": [1, 0]}, "$.passes[0].steps",
        "names 2 steps, and transformer is called in 6",
    ),
    "ratios of the wrong length": (
        "flux", "transformer", {"method": "magcache", "ratios": [1.0, 1.0]}, "$.passes[0].ratios", "names 2 steps",
    ),
    "all steps compute": (
        "flux", "transformer", {"method": "fora", "interval": 2, "start": 6}, "$.passes[0]", "would have no effect",
    ),
    "no block is left": (
        "flux", "transformer", {"method": "dbcache", "interval": 2, "front": 2, "back": 2}, "$.passes[0]",
        "leave none of",
    ),
    "not the denoiser": ("flux", "vae", {"method": "fora", "interval": 2}, "$.passes[0]", "denoising run"),
    "no UNet": ("flux", "transformer", {"method": "deepcache", "interval": 2}, "$.passes[0].method", "is for UNets"),
    "deeper than it is": (
        "sd", "unet", {"method": "deepcache", "interval": 2, "depth": 99}, "$.passes[0].depth", "the way up of",
    ),
    "a batch that is not doubled": (
        "flux", "transformer", {"method": "fastercache", "dynamic": True, "interval": 2}, "$.passes[0].method",
        "splits a doubled batch",
    ),
    "no such component": ("flux", "unet", {"method": "fora", "interval": 2}, "$.passes[0].component", "no component"),
    "a hook that nothing feeds": (
        "flux", "transformer", {"method": "seacache", "dynamic": True, "threshold": 0.1}, "$.passes[0].method",
        "would reuse nothing",
    ),
    "no hooks": (
        "sdxl", "unet", {"method": "first_block", "dynamic": True, "threshold": 0.1}, "$.passes[0]", "no enable_cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_the_model_does_not_allow_is_refused_by_path(name, families):
    family, component, options, where, reason = ILLEGAL[name]
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(spec(families, family, component, **options))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert reason in str(caught.value)


def test_hooks_inside_of_blocks_exclude_engines(families):
    made = spec(families, "flux", method="pab", dynamic=True, interval=2)
    made["passes"].append({"name": "compile", "component": "transformer"})
    with pytest.raises(IllegalPlan, match="compile cannot follow cache_schedule: its hooks are inside the blocks"):
        diffkiln.check(made)


def test_check_foretells_the_schedule_and_inspect_shows_it(families, tmp_path):
    from click.testing import CliRunner

    from diffkiln.cli import cli

    made = spec(families, "flux", method="dbcache", interval=2)
    (ran,) = diffkiln.check(made).report
    assert ran.notes == ("3 of 6 steps compute: ●○●○●○",)
    diffkiln.compile(made, tmp_path / "bundle")
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle")]).output
    assert "transformer  ●◐●◐●◐" in shown
    rows = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle"), "--json"]).output)["schedules"]
    (steps,) = (components["transformer"] for components in rows.values())
    whole = steps[0]["blocks"]
    assert [step["blocks"] for step in steps] == [whole, 1, whole, 1, whole, 1]


def test_its_own_sigmas_are_counted(families):
    made = spec(families, "flux", method="mask", steps=[1, 0, 1, 0])
    made["inputs"]["call"]["sigmas"] = [1.0, 0.7, 0.5, 0.2]
    assert diffkiln.check(made).state.steps == (4,)


def test_the_scheduler_comes_first(families):
    made = spec(families, "sd", "unet", method="fora", interval=2)
    made["passes"].append({"name": "scheduler", "type": "EulerDiscreteScheduler"})
    with pytest.raises(IllegalPlan, match=r"scheduler must come before cache_schedule .*how many steps"):
        diffkiln.check(made)


def test_a_call_without_marks_has_as_many_calls_a_step_as_fit(families, tmp_path):
    """PixArt has no callback at the end of a step."""
    made = spec(families, "pixart_sigma", method="mask", steps=[1, 0, 1, 0, 1, 0])
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    with definitions.output(Run(pipe.transformer, MASK)):
        wanted = draw(pipe, made)
    with diffkiln.load(built.path) as compiled:
        assert float((draw(compiled, made) - wanted).abs().max()) <= 2e-5


def test_without_a_program_there_is_nothing_to_rewrite(families, tmp_path, monkeypatch):
    from diffkiln.errors import PassError, RecordError

    def unrecordable(*_: Any) -> Any:
        raise RecordError("it cannot be")

    monkeypatch.setattr("diffkiln.compiler.compile.record", unrecordable)
    made = spec(families, "flux", method="fora", interval=2) | {"runtime": {"on_unrecordable": "diffusers"}}
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: cache_schedule rewrites the program, but there is none: it"):
        diffkiln.compile(made, tmp_path / "bundle")


def test_a_pipeline_that_tells_the_hooks_nothing_is_refused_with_them(families, tmp_path):
    made = spec(families, "chroma", method="taylorseer", interval=2)
    built = diffkiln.compile(made, tmp_path / "bundle")
    with quiet_libraries(), pytest.raises(Incompatible, match="which of its calls is which, which taylorseer needs"):
        diffkiln.load(built.path, as_diffusers=True)


SCHEDULES = pass_class("cache_schedule").variants()
FOREIGN = [
    (called, option)
    for called, model in SCHEDULES.items()
    for option in sorted({name for other in SCHEDULES.values() for name in other.own_fields()} - {*model.own_fields()})
]


@pytest.mark.parametrize(("called", "option"), FOREIGN, ids="-".join)
def test_every_option_of_every_other_method_is_refused_by_name(called, option):
    model = SCHEDULES[called]
    given = {field: constant(model, field) for field in model.discriminators}
    given |= {"steps": (1, 0), "interval": 2, "ratios": (1.0, 1.0), "threshold": 0.1}
    given = {name: value for name, value in given.items() if name in model.model_fields}
    if "interval" in given:
        given.pop("steps", None)
    entry = {"name": "cache_schedule", "component": "transformer", **given}
    assert isinstance(read_passes([PassEntry.model_validate(entry)])[0].step, model)
    with pytest.raises(SpecError) as caught:
        read_passes([PassEntry.model_validate(entry | {option: 2})])
    (problem,) = caught.value.problems
    assert (problem.where, problem.reason) == (f"$.passes[0].{option}", f"{called} has no option {option}")
    # A null gives nothing, and so changes nothing.
    assert read_passes([PassEntry.model_validate(entry | {option: None})])


def test_methods_are_schedules():
    assert all(issubclass(model, CacheSchedule) for model in SCHEDULES.values())
    assert len(SCHEDULES) == 11
