"""add_slots: room for adapters beside linear layers, which changes no result until one is put in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffkiln.errors import IllegalPlan
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP
from diffkiln.passes.registry import IMPLIED, with_implied
from diffkiln.spec import parse_spec
from tests.passes.calls import call_of, distance, replays, result_of
from tests.passes.plans import checked, ghost, placed, real, types

SLOTS = {"name": "add_slots", "component": "transformer", "rank": 4, "slots": 2}
FUSED = {"name": "fuse_qkv", "component": "transformer"}


def test_slots_change_no_bit_and_replay():
    plan = ghost("flux")
    steps = checked(plan, FUSED, SLOTS)
    shadow, module = plan.modules["transformer"], real("flux", "transformer")
    for item in steps:
        item.step.apply(shadow)
        item.step.apply(module)
    assert types(shadow) == types(module)
    leaves, structure = call_of("flux", "transformer")
    replays(shadow, module, leaves, structure)
    plain = real("flux", "transformer")
    steps[0].step.apply(plain)
    assert distance(result_of(module, leaves, structure), result_of(plain, leaves, structure)) == 0
    fused = module.transformer_blocks[0].attn.to_qkv
    assert fused._buffers[DOWN].shape == (3, 2, 4, fused.in_features)
    assert fused._buffers[UP].shape == (fused.out_features, 2, 4)
    assert fused._buffers[FACTORS].shape == (8, 3 * 2 * 4)


def test_they_stand_beside_quantized_weights():
    plan = ghost("flux")
    int8 = {"name": "quantize", "component": "transformer", "backend": "torchao", "type": "int8_weight_only"}
    steps = checked(plan, int8, SLOTS)
    shadow, module = plan.modules["transformer"], real("flux", "transformer")
    for item in steps:
        item.step.apply(shadow)
        item.step.apply(module)
    assert types(shadow) == types(module)
    leaves, structure = call_of("flux", "transformer")
    replays(shadow, module, leaves, structure)
    assert module.transformer_blocks[0].attn.to_q._buffers[DOWN].dtype == torch.float32


def test_patterns_choose_layers():
    plan = ghost("flux")
    (item,) = checked(plan, SLOTS | {"include": ["*attn*"], "exclude": ["*.to_out.*"]})
    module = plan.modules["transformer"]
    (note,) = item.step.apply(module)
    having = {name for name, part in module.named_modules() if DOWN in part._buffers}
    assert having == {
        name
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and "attn" in name and ".to_out." not in name
    }
    tensors = [part._buffers[key] for part in module.modules() for key in (DOWN, UP, FACTORS) if key in part._buffers]
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert note == f"{len(having)} layers with 2 slots of rank 4: {size} bytes, zeros in the bundle's files"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"include": ["*nothing*"]}, "matches no linear layer of transformer"),
        ({"exclude": ["*"]}, "no layer of transformer is left to get slots"),
        ({"component": "text_encoder"}, "text_encoder is not a part of the denoising run"),
        ({"component": "vae"}, "vae is not a part of the denoising run"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(IllegalPlan, match=words):
        checked(ghost("flux"), SLOTS | changes)


def test_a_batch_of_more_rows_is_refused():
    plan = replace(ghost("flux"), variants=({"batch_size": 4, "num_images_per_prompt": 3},))
    with pytest.raises(IllegalPlan, match=r"a batch has 12 rows.*Give 48 or more"):
        checked(plan, SLOTS)


def test_engines_that_hold_their_weights_are_refused():
    held = {"name": "compile", "component": "transformer", "backend": "openvino"}
    with pytest.raises(IllegalPlan, match=r"hold their weights, so no adapter can be put into their slots"):
        checked(ghost("flux"), SLOTS, held)


def asked(**adapters: Any) -> Any:
    return parse_spec(
        {
            "spec_version": 1,
            "source": {"model": "x"},
            "target": {"device": "cpu"},
            "inputs": {"height": 64, "width": 64},
            "runtime": {"adapters": adapters},
        }
    )


def test_the_runtime_asks_for_it_where_it_may_stand():
    plan = replace(ghost("flux"), variants=({"batch_size": 2},))
    listed = placed(FUSED, {"name": "compile", "component": "transformer"})
    found = with_implied(listed, asked(rank=8, slots=3, exclude=["*norm*"]), plan)
    assert [item.step.name for item in found] == ["fuse_qkv", "add_slots", "compile"]
    assert (found[1].index, found[1].where) == (IMPLIED, "$.runtime.adapters")
    options = found[1].step.options()
    assert options == {
        "component": "transformer", "rank": 8, "slots": 3, "rows": 8, "include": ["*"], "exclude": ["*norm*"],
        "fewer": None,
    }  # fmt: skip
    assert [item.step.name for item in with_implied(placed(SLOTS), asked(), plan)] == ["add_slots"]
