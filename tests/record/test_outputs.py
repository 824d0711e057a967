"""What a recorded call gives."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.program import TensorType
from diffkiln.record.constants import Constants
from diffkiln.record.outputs import of_field, outputs_of
from diffkiln.record.tape import Tape


def tape_with(*shapes):
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), what="the call")
    return tape, [tape.new_input("layers", TensorType("float32", shape)) for shape in shapes]


def shapes_of(result, tape):
    with torch.inference_mode():
        return [tuple(tensor.shape) for tensor in outputs_of(SimpleNamespace(__call__=None), result, tape)[0]]


def test_pictures_of_every_prompt_are_one_tensor():
    """Qwen-Image gives a list of layers for each prompt."""
    tape, layers = tape_with((4, 3, 8, 8), (4, 3, 8, 8))
    assert shapes_of({"images": layers}, tape) == [(2, 4, 3, 8, 8)]
    assert shapes_of({"images": layers[:1]}, tape) == [(1, 4, 3, 8, 8)]
    real = [torch.rand(4, 3, 8, 8) for _ in range(2)]
    assert of_field({"images": real}, "images").equal(torch.stack(real))


def test_of_lists_that_are_no_pictures_the_first_tensor_is_given():
    tape, given = tape_with((2, 5), (2, 5))
    assert shapes_of({"result": given}, tape) == [(2, 5)]
    tape, given = tape_with((3, 8, 8), (3, 4, 4))
    assert shapes_of({"images": given}, tape) == [(3, 8, 8)]
