"""cast: weights of another floating-point type."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.passes import manager
from tests.passes.plans import both, checked, ghost, types


def test_ghost_and_module_come_out_alike():
    shadow, module = both("flux", "transformer", {"name": "cast", "component": "transformer", "dtype": "bfloat16"})
    assert types(shadow) == types(module)
    assert {dtype for _, dtype in types(module).values()} == {torch.bfloat16}


def test_values_are_rounded_and_not_changed_otherwise():
    from tests.passes.plans import real

    before = real("flux", "transformer").state_dict()
    _, module = both("flux", "transformer", {"name": "cast", "component": "transformer", "dtype": "float16"})
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name].to(torch.float16))


def test_modules_that_diffusers_keeps_in_float32_stay():
    plan, fake = ghost("wan")
    module = plan.modules["transformer"]
    kept = set(module._keep_in_fp32_modules)
    assert kept
    steps = checked(plan, {"name": "cast", "component": "transformer", "dtype": "bfloat16"})
    plan, _ = manager.run(plan, steps, fake)
    for name, (_, dtype) in types(plan.modules["transformer"]).items():
        assert dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name


def test_cast_to_what_it_is_already_has_no_effect_and_is_refused():
    plan, fake = ghost("flux")
    steps = checked(plan, {"name": "cast", "component": "vae", "dtype": "float32"})
    with pytest.raises(IllegalPlan, match="no effect"):
        manager.run(plan, steps, fake)
