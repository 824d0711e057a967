"""Checks of a range that every request passes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent
from diffkiln.program import TensorType
from diffkiln.record.constants import Constants
from diffkiln.record.tape import Tape

IMAGE = {"kind": "image", "normalize": False, "scaled": None}


def asked(question, dtype="float32", **source):
    """What a tape answers to a question about an input."""
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), what="the call")
    value = tape.new_input("image", TensorType(dtype, (2, 3, 4)), source)
    with torch.inference_mode(), tape:
        return bool(question(value))


def test_an_image_is_within_the_range_that_the_runtime_sees_to():
    assert asked(lambda x: x.unsqueeze(0).to(torch.float64).min() >= 0, **IMAGE)
    assert not asked(lambda x: torch.cat([x, x]).max() > 1, **IMAGE)
    assert asked(lambda x: x.amin() >= -1, **IMAGE | {"normalize": True})


def test_a_mask_of_truth_values_is_within_zero_and_one():
    assert not asked(lambda x: x.min() < 0, "bool")
    assert not asked(lambda x: x.max() > 1, "bool")


@pytest.mark.parametrize(
    ("question", "source"),
    [
        (lambda x: x.min() >= 0, {"kind": "tensor", "keyword": "mask"}),
        (lambda x: x.min() >= 0, IMAGE | {"normalize": True}),
        (lambda x: x.max() > 0.5, IMAGE),
        (lambda x: (x * 2).max() <= 2, IMAGE),
        (lambda x: x.min() >= 0, IMAGE | {"scaled": {"factor": 1.0}}),
        (lambda x: torch.cat([x, x * 2]).min() >= 0, IMAGE),
        (lambda x: x.min(), IMAGE),
    ],
)
def test_what_a_request_decides_is_refused(question, source):
    with pytest.raises(DataDependent, match="is_nonzero"):
        asked(question, **source)
