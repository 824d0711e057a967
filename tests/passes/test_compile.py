"""compile: which regions a backend gets, from configuration alone."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.passes import manager
from diffkiln.passes.base import Plan
from diffkiln.spec import TargetSpec, resolve_target
from tests.passes.plans import checked, ghost, placed

COMPILE = {"name": "compile", "component": "transformer"}


def test_plan_asks_for_the_blocks_of_the_component():
    plan = ghost("flux")
    after, report = manager.run(plan, checked(plan, COMPILE))
    assert [(request.component, request.backend) for request in after.compile] == [("transformer", "aot_inductor")]
    assert plan.compile == ()
    assert report[0].changed


def test_component_without_blocks_is_refused():
    plan = Plan("Pipeline", {"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(IllegalPlan, match="Linear declares no repeated blocks"):
        checked(plan, COMPILE)


def test_gpu_target_is_refused_with_the_reason():
    plan = ghost("flux")
    target = resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4"))
    with pytest.raises(IllegalPlan, match="CPUs only"):
        manager.run(plan, placed(COMPILE), [target])


def test_twice_for_one_component_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="stands twice"):
        checked(plan, COMPILE, COMPILE)
