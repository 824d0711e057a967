"""Slots beside linear layers: what they add, and to which rows."""

from __future__ import annotations

import inspect

import pytest
import torch

from diffkiln.interpreter.layers import Int8, Slotted, can_have_slots, put_slots, put_slots_as_stored, store
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP

RANK, SLOTS, ROWS = 2, 3, 4


class Model(torch.nn.Module):
    """Two layers, of which one is fused; the second one is given rows that are not the batch's where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.to_qkv = torch.nn.Linear(4, 6), torch.nn.Linear(6, 9)
        self.double().requires_grad_(False)

    def forward(self, sample: torch.Tensor, shared: bool = False) -> torch.Tensor:
        hidden = self.proj(sample)
        return self.to_qkv(hidden[:1] if shared else hidden)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    put_slots(model, ["proj", "to_qkv"], RANK, SLOTS, ROWS)
    for layer in (model.proj, model.to_qkv):
        for name in (DOWN, UP, FACTORS):
            layer._buffers[name].copy_(torch.randn_like(layer._buffers[name]))
    return model


def weight_of(layer: torch.nn.Module, row: int) -> torch.Tensor:
    """The weight that a row of the batch is multiplied by."""
    down, up = layer._buffers[DOWN], layer._buffers[UP].flatten(1)
    parts = down.shape[0]
    factors = layer._buffers[FACTORS][row].view(parts, -1, 1)
    pieces = [
        rows @ (scale * part.flatten(0, 1)) for rows, part, scale in zip(up.chunk(parts), down, factors, strict=True)
    ]
    return layer.weight + torch.cat(pieces)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_each_row_has_its_own_sum(shape):
    model, given = filled(Model()), torch.randn(shape).double()
    found = model(given)
    for row in range(shape[0]):
        hidden = torch.nn.functional.linear(given[row], weight_of(model.proj, row), model.proj.bias)
        wanted = torch.nn.functional.linear(hidden, weight_of(model.to_qkv, row), model.to_qkv.bias)
        torch.testing.assert_close(found[row], wanted)


def test_a_row_of_the_batch_may_be_several_of_a_layer_s():
    class Frames(Model):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return self.proj(sample.flatten(0, 1)).unflatten(0, sample.shape[:2])

    model, given = filled(Frames()), torch.randn(2, 3, 4).double()
    found = model(given)
    for row in range(2):
        wanted = torch.nn.functional.linear(given[row], weight_of(model.proj, row), model.proj.bias)
        torch.testing.assert_close(found[row], wanted)


def test_rows_that_are_not_the_batch_s_get_nothing():
    model, given = filled(Model()), torch.randn(2, 4).double()
    hidden = torch.nn.functional.linear(given[:1], weight_of(model.proj, 0), model.proj.bias)
    found = model(given, shared=True)
    wanted = torch.nn.functional.linear(hidden, model.to_qkv.weight, model.to_qkv.bias)
    torch.testing.assert_close(found, wanted)


def test_more_rows_than_there_are_factors_for_get_nothing():
    model, given = filled(Model()), torch.randn(ROWS + 1, 4).double()
    hidden = torch.nn.functional.linear(given, model.proj.weight, model.proj.bias)
    torch.testing.assert_close(model(given), torch.nn.functional.linear(hidden, model.to_qkv.weight, model.to_qkv.bias))


def test_empty_slots_change_no_bit():
    model, given = Model(), torch.randn(2, 4).double()
    before = model(given)
    put_slots(model, ["proj", "to_qkv"], RANK, SLOTS, ROWS)
    assert torch.equal(model(given), before)


def test_classes_keep_their_names_and_the_model_its_signature():
    model = filled(Model())
    assert type(model).__name__ == "Model"
    assert type(model).__module__ == __name__
    assert isinstance(model.proj, torch.nn.Linear)
    assert isinstance(model.proj, Slotted)
    assert list(inspect.signature(model.forward).parameters) == ["sample", "shared"]
    other = type(filled(Model()))
    assert other is type(model)
    put_slots(model, [], RANK, SLOTS, ROWS)
    assert type(model) is other


def test_quantized_layers_may_have_slots_and_others_may_not():
    layer = torch.nn.Linear(4, 6).double()
    parts = {"weight_data": torch.ones(6, 4, dtype=torch.int8), "weight_scale": torch.ones(6, 1)}
    store(layer, Int8(), parts)
    assert can_have_slots("proj", layer)
    assert not can_have_slots("proj", torch.nn.Conv2d(4, 6, 1))
    assert not can_have_slots("to_qkv", torch.nn.Linear(4, 7)), "its parts are not alike"
    assert not can_have_slots("proj", torch.nn.Linear(4, 6).to(torch.float8_e4m3fn))
    model = Model()
    model.proj = layer
    assert not can_have_slots("proj", filled(model).proj), "it has some"
    given = torch.randn(2, 4).double()
    hidden = torch.stack([torch.nn.functional.linear(given[row], weight_of(layer, row), layer.bias) for row in (0, 1)])
    torch.testing.assert_close(layer(given), hidden)


def test_a_bundle_s_tensors_say_which_slots_there_are():
    model = filled(Model())
    again = Model()
    put_slots_as_stored(again, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    again.load_state_dict(model.state_dict())
    given = torch.randn(2, 4).double()
    assert torch.equal(again(given), model(given))
