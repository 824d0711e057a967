"""What of a program ONNX Runtime takes, from its types alone."""

from __future__ import annotations

import pytest

from diffkiln.exporters.onnx.check import KEPT, TYPES, type_problems
from diffkiln.program import DType, Input, Op, Program, Ref, TensorType
from diffkiln.runtime.engines.onnx.engine import NUMBERS


def one_op(name: str, before: str, after: str) -> Program:
    types = {"%x": TensorType(before, (2, 3)), "%1": TensorType(after, (2, 3))}
    return Program(
        "p", (Input("%x", types["%x"]),), (Op(name, (Ref("%x"), DType(after)), ("%1",)),), (Ref("%1"),), types
    )


@pytest.mark.parametrize("kept", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_types_may_be_kept_and_cast_but_not_computed_in(kept):
    assert not list(type_problems(one_op("aten.to.dtype", kept, "float32")))
    assert not list(type_problems(one_op("aten.to.dtype", "float32", kept)))
    (reason,) = type_problems(one_op("aten.neg.default", kept, kept))
    assert reason.startswith(f"found aten.neg.default in {kept}, required float32")


def test_types_that_onnx_has_not():
    (reason,) = type_problems(one_op("aten.neg.default", "complex32", "complex32"))
    assert reason.startswith("found complex32 (x), required one of float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int8", "bool"])
def test_other_types_are_taken(dtype):
    assert not list(type_problems(one_op("aten.neg.default", dtype, dtype)))


def test_the_exporter_takes_the_types_that_the_engine_can_bind() -> None:
    assert set(NUMBERS) == set(TYPES)
    assert set(TYPES) >= KEPT
