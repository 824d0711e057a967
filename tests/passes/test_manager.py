"""The manager: every check before anything runs, problems together, passes guarded and verified."""

from dataclasses import replace

import pytest
import torch

from diffkiln.errors import IllegalPlan, PassError, SpecError
from diffkiln.passes import manager, registry
from diffkiln.passes.base import Outcome
from diffkiln.passes.model.cast import Cast
from tests.passes.plans import CPU, checked, ghost, placed

FUSE = {"name": "fuse_qkv", "component": "transformer"}
INT8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}


def test_all_problems_are_reported_together():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan) as caught:
        checked(plan, INT8 | {"exclude": ["nothing"]}, FUSE, {"name": "compile", "component": "transfomer"})
    assert [problem.where for problem in caught.value.problems] == [
        "$.passes[1]",
        "$.passes[0].exclude[0]",
        "$.passes[2].component",
    ]


def test_wrong_order_names_both_the_reason_and_the_mend():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan) as caught:
        checked(plan, INT8, FUSE)
    problem = caught.value.problems[0]
    assert problem.where == "$.passes[1]"
    assert (
        "fuse_qkv must come before quantize ($.passes[0]): quantized projections cannot be concatenated"
        in problem.reason
    )
    assert problem.hint == "Move it before $.passes[0]."


def test_order_does_not_matter_between_components():
    plan = ghost("flux")
    checked(plan, {"name": "quantize", "component": "text_encoder", "type": "int8_weight_only"}, FUSE)


def test_unknown_component_has_the_nearest_as_mend():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"no component 'transfomer'.*transformer"):
        checked(plan, FUSE | {"component": "transfomer"})


def test_a_pass_that_raises_is_named_with_its_place(monkeypatch):
    def broken(self, module):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Cast, "apply", broken)
    plan = ghost("flux")
    steps = placed({"name": "cast", "component": "vae", "dtype": "float16"})
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: cast failed: ZeroDivisionError: oops"):
        manager.run(plan, steps, [CPU])
    with pytest.raises(PassError, match=r"\$\.passes\[0\]: cast failed"):
        manager.apply(torch.nn.Linear(1, 1), "vae", steps)


def _gives_gradients(self, module):
    next(module.parameters()).requires_grad_(True)
    return ["done"]


def _gives_data(self, module):
    module.encoder.conv_in.bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    return ["done"]


@pytest.mark.parametrize(
    ("careless", "reason"),
    [
        (_gives_gradients, r"cast left vae\..* with a gradient"),
        (_gives_data, r"cast left vae\.encoder\.conv_in\.bias with data"),
    ],
)
def test_a_pass_that_leaves_what_no_ghost_has_breaks_the_plan(monkeypatch, careless, reason):
    monkeypatch.setattr(Cast, "apply", careless)
    plan = ghost("flux")
    steps = placed({"name": "cast", "component": "vae", "dtype": "float16"})
    with pytest.raises(PassError, match=reason):
        manager.run(plan, steps, [CPU])


def test_a_pass_that_loses_a_component_breaks_the_plan(monkeypatch):
    def careless(self, plan):
        return Outcome(replace(plan, modules={"vae": plan.modules["vae"]}), True)

    monkeypatch.setattr(Cast, "run", careless)
    plan = ghost("flux")
    steps = placed({"name": "cast", "component": "vae", "dtype": "float16"})
    with pytest.raises(PassError, match="cast left the components vae of "):
        manager.run(plan, steps, [CPU])


def test_a_pass_is_checked_against_the_names_that_earlier_passes_leave():
    plan = ghost("flux")
    steps = checked(plan, FUSE, INT8 | {"include": ["*.to_qkv"]})
    plan, report = manager.run(plan, steps, [CPU])
    assert report[1].notes[0].startswith("4 linear layers")
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[1\]\.exclude\[0\]: the pattern '\*\.to_q' matches no layer"):
        checked(plan, FUSE, INT8 | {"exclude": ["*.to_q"]})


def test_what_is_illegal_is_not_tried_out():
    plan = ghost("qwen_image")
    with pytest.raises(IllegalPlan) as caught:
        checked(plan, FUSE, INT8 | {"exclude": ["*.to_nothing"]})
    assert [problem.where for problem in caught.value.problems] == ["$.passes[0]", "$.passes[1].exclude[0]"]


def test_a_problem_is_told_once_for_several_targets():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan) as caught:
        manager.run(plan, placed(INT8 | {"exclude": ["nothing"]}), [CPU, CPU])
    assert len(caught.value.problems) == 1


def test_only_the_passes_of_a_component_are_applied_to_it():
    module = torch.nn.Linear(2, 2)
    manager.apply(module, "vae", placed({"name": "cast", "component": "unet", "dtype": "float16"}))
    assert module.weight.dtype == torch.float32


def test_unknown_passes_and_wrong_options_are_reported_together():
    with pytest.raises(SpecError) as caught:
        placed(
            {"name": "fuse_qvk", "component": "x"},
            {"name": "cast", "component": "x", "dtype": "int3"},
            {"name": "cast"},
        )
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres[0] == "$.passes[0].name"
    assert {"$.passes[1].dtype", "$.passes[2].component", "$.passes[2].dtype"} <= set(wheres)
    assert "fuse_qkv" in str(caught.value)


def test_registry_holds_every_pass_under_its_own_name():
    assert {name: registry.pass_class(name).name for name in registry.option_models()} == {
        name: name for name in registry.option_models()
    }
    assert all(registry.pass_class(name).summary for name in registry.option_models())
    assert CPU.device == "cpu"
