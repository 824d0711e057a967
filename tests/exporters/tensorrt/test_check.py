"""Which library of TensorRT is for which GPU, what types it takes, and how much of an engine's weights stays there."""

from __future__ import annotations

import pytest

from diffkiln.bundle.tensorrt import FULL, RTX
from diffkiln.exporters.tensorrt.build import planned_budget
from diffkiln.exporters.tensorrt.check import TYPES, library_for, type_problems
from diffkiln.program import Input, Program, Ref, TensorType
from diffkiln.spec import GPUS

GB = 10**9


def one(dtype: str) -> Program:
    kind = TensorType(dtype, (2, 3))
    return Program("p", (Input("%x", kind),), (), (Ref("%x"),), {"%x": kind})


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("nvidia-rtx-2080-ti", RTX),
        ("nvidia-rtx-3090", RTX),
        ("nvidia-rtx-4090", RTX),
        ("nvidia-l4", RTX),
        ("nvidia-rtx-5090", RTX),
        ("nvidia-a100-80gb-sxm", FULL),
        ("nvidia-h200", FULL),
        ("nvidia-b200", FULL),
    ],
)
def test_tensorrt_for_rtx_wherever_its_matrix_has_the_gpu(name, library):
    assert library_for(GPUS[name].capability) is library


@pytest.mark.parametrize("dtype", TYPES)
def test_types_that_are_computed_in(dtype):
    assert not list(type_problems(one(dtype), (8, 9)))


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "float8_e5m2", "uint8", "int16", "complex32"])
def test_other_types_are_told_found_against_required(dtype):
    (reason,) = type_problems(one(dtype), (8, 9))
    assert reason == f"found {dtype}, required one of {', '.join(TYPES)} (x of p)"


def test_turing_has_no_bfloat16():
    (reason,) = type_problems(one("bfloat16"), (7, 5))
    assert reason.startswith("found bfloat16 for compute capability 7.5, required float32 or float16")


@pytest.mark.parametrize(
    ("memory", "weights", "budget"),
    [(24 * GB, 23 * GB, 18 * GB), (24 * GB, 18 * GB, None), (24 * GB, 2 * GB, None), (None, 23 * GB, None)],
)
def test_weights_are_streamed_where_three_quarters_of_the_memory_cannot_hold_them(memory, weights, budget):
    assert planned_budget(memory, weights) == budget
