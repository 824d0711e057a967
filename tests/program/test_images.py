"""What the source of an image may say: a bundle's file may come from anybody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffkiln.errors import VerifyError
from diffkiln.program import Input, TensorType, verify
from diffkiln.program.images import image_keywords, is_edits, is_scaled, size_after
from tests.program.programs import MODULE, PIPELINE

SOURCE = {
    "kind": "image", "keyword": "image", "index": [0, 1], "edits": [["resize", 24, 16, "lanczos"]], "size": None,
    "normalize": True, "binarize": False, "scaled": None,
}  # fmt: skip


def verified(shape=(2, 3, 16, 24), dtype="float32", **changed):
    item = Input("%image", TensorType(dtype, shape), SOURCE | changed)
    call = replace(PIPELINE, inputs=(*PIPELINE.inputs, item), types={**PIPELINE.types, item.name: item.type})
    verify(call, modules={"transformer": MODULE})
    return call


def test_a_recorded_source_is_well_formed():
    assert image_keywords(verified().inputs) == {"image": 2}
    verified(edits=[], size=[24, 16])
    verified(edits=[["convert", "L"]], shape=(2, 1, 7, 7))  # of whatever size the image has
    verified(edits=[["resize", 40, 30, "bicubic"], ["crop", 8, 7, 32, 23]])
    verified(scaled={"factor": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"shape": (3, 16, 24)}, "is not a tensor of 2 images"),
        ({"shape": (1, 3, 16, 24)}, "is not a tensor of 2 images"),
        ({"dtype": "int64"}, "is not a tensor of 2 images"),
        ({"shape": (2, 3, 2**40, 24)}, "24 x 16 pixels"),
        ({"edits": [], "size": [9, 9]}, "9 x 9 pixels"),
        ({"edits": [["crop", 0, 0, 24, 17]]}, "24 x 17 pixels"),
        ({"shape": (2, 1, 16, 24), "scaled": {"factor": 1, "mean": [0] * 3, "std": [1] * 3}}, "lacks the channels"),
        ({"index": [-1, 0]}, "lacks a proper .*index"),
        ({"index": []}, "lacks a proper .*index"),
        ({"size": [0, 5]}, "lacks a proper .*size"),
        ({"edits": None}, "lacks a proper .*edits"),
        ({"normalize": 1}, "lacks a proper .*normalize"),
    ],
)
def test_a_source_that_does_not_fit_its_tensor_is_refused(changed, reason):
    with pytest.raises(VerifyError, match=reason):
        verified(**changed)


@pytest.mark.parametrize(
    "edit",
    [
        ["resize", 0, 4, "lanczos"],
        ["resize", -4, 4, "lanczos"],
        ["resize", 2**16, 4, "lanczos"],
        ["resize", 4.0, 4, "lanczos"],
        ["resize", True, 4, "lanczos"],
        ["resize", 4, 4, "open"],
        ["resize", 4, 4],
        ["resize", 4, 4, "bicubic", 0.5],
        ["resize", 4, 4, "bicubic", True],
        ["resize", 4, 4, "bicubic", float("nan")],
        ["resize", 4, 4, "torch_bicubic", 2],
        ["resize", 4, 4, "bicubic", 2, 2],
        ["crop", 4, 0, 4, 4],
        ["crop", -(2**40), 0, 4, 4],
        ["crop", -(2**16) + 1, 0, 2**16 - 1, 4],
        ["convert", "P"],
        ["save", "/tmp/x"],
        [],
        "crop",
    ],
)
def test_an_edit_that_is_none_is_refused(edit):
    assert not is_edits([edit])


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan"), True, None])
def test_a_scale_beyond_use_is_refused(number):
    assert not is_scaled({"factor": number})
    assert not is_scaled({"factor": 1, "mean": [0, 0, number], "std": [1, 1, 1]})


def test_an_image_may_be_resized_in_two_steps():
    assert is_edits([["resize", 4, 4, "bicubic", 1], ["resize", 4, 4, "lanczos", 2.5]])
    assert size_after([["resize", 8, 4, "bicubic", 1]], None) == (8, 4)


def test_the_last_edit_decides_the_size():
    assert size_after([["resize", 8, 4, "box"], ["crop", -1, 0, 3, 2], ["convert", "L"]], [1, 1]) == (4, 2)
    assert size_after([["convert", "L"]], [3, 2]) == (3, 2)
    assert size_after([], None) is None
