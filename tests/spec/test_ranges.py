"""Ranges of sizes: what they stand for, and what is refused."""

import re

import pytest

from diffkiln.spec import Inputs, Spec
from tests.spec.test_model import complaints

SIZE = {"width": 64, "num_inference_steps": 2}


def test_range_stands_for_every_size_from_the_smallest_to_the_largest():
    inputs = Inputs.model_validate(SIZE | {"height": {"min": 64, "max": 128, "step": 32}})
    assert [(each.height, each.width) for each in inputs.each()] == [(64, 64), (96, 64), (128, 64)]
    assert inputs.has_ranges
    assert not any(each.has_ranges for each in inputs.each())


def test_two_ranges_stand_for_every_pair(example):
    sizes = {"min": 64, "max": 96, "step": 32}
    example["inputs"] = [{**example["inputs"], "height": sizes, "width": sizes}, example["inputs"]]
    spec = Spec.model_validate(example)
    assert len(spec.variants) == 5
    assert Spec.model_validate(spec.as_json()) == spec


@pytest.mark.parametrize(
    ("given", "where", "reason"),
    [
        ({"min": 64, "max": 64, "step": 8}, "$.height.max", "is not above the smallest, 64"),
        ({"min": 64, "max": 100, "step": 16}, "$.height.step", "16 does not lead from 64 to 100"),
        ({"min": 64, "max": 128}, "$.height.step", "is missing"),
        ({"min": 64, "max": 128, "step": 0}, "$.height.step", "1"),
        ({"min": 8, "max": 8192, "step": 8}, "$.height", "gives? 1024 sizes"),
        ([64, 128], "$.height", "whole number"),
    ],
)
def test_wrong_ranges_are_refused_by_path(given, where, reason):
    found = complaints(Inputs, **SIZE, height=given)
    assert where in found
    assert re.search(reason, found[where])
