"""channels_last: the layout of convolutions outside of repeated blocks; the values stay."""

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.interpreter.layers import is_channels_last
from tests.passes.calls import call_of, distance, replays, result_of
from tests.passes.plans import both, checked, ghost, real, types

LAST = {"name": "channels_last", "component": "unet"}


def test_convolutions_are_laid_out_and_replay():
    plan = ghost("sdxl")
    steps = checked(plan, LAST)
    shadow, module = plan.modules["unet"], real("sdxl", "unet")
    steps[0].step.apply(shadow)
    steps[0].step.apply(module)
    assert types(shadow) == types(module)
    kernels = {name: part.weight for name, part in module.named_modules() if isinstance(part, torch.nn.Conv2d)}
    wide = {name for name, weight in kernels.items() if weight.shape[2:] != (1, 1)}
    assert wide == {name for name, weight in kernels.items() if is_channels_last(weight)}
    assert wide == {name for name in kernels if is_channels_last(shadow.get_submodule(name).weight)}
    leaves, structure = call_of("sdxl", "unet")
    replays(shadow, module, leaves, structure)
    assert distance(result_of(module, leaves, structure), result_of(real("sdxl", "unet"), leaves, structure)) < 1e-5


def test_a_decoder_is_laid_out_too():
    _, module = both("sdxl", "vae", LAST | {"component": "vae"})
    assert is_channels_last(module.decoder.conv_in.weight)


def test_without_convolutions_it_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="has no 2D convolution outside of its repeated blocks"):
        checked(plan, LAST | {"component": "transformer"})
