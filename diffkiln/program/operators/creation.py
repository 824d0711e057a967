"""Operators that make tensors of numbers. None gives memory as it was found."""

from __future__ import annotations

import math
from typing import Any

from diffkiln.program.ir import Device, DType, Layout, MemoryFormat, TensorType
from diffkiln.program.operators.promotion import FLOAT, SIZES, category
from diffkiln.program.operators.table import (
    MAX_SIZE,
    Number,
    broadcast,
    flag,
    integer,
    number,
    operator,
    require,
    sizes,
    tensor,
)

MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")


def options(default: str, dtype: Any, layout: Any, device: Any, pin_memory: Any) -> str:
    """Returns the dtype that the common options of creation ask for."""
    require(layout is None or layout == Layout("strided"), f"{layout!r} is not the layout of a dense tensor")
    require(device is None or isinstance(device, Device), f"{device!r} is not the device of the program")
    require(not pin_memory, "memory is not pinned by a program")
    if dtype is None:
        return default
    require(isinstance(dtype, DType) and dtype.name in SIZES, f"{dtype!r} is not a dtype of programs")
    return dtype.name


def check_format(value: Any) -> None:
    """Refuses what is no memory format."""
    if value is not None:
        require(isinstance(value, MemoryFormat) and value.name in MEMORY_FORMATS, f"{value!r} is no memory format")


def dtype_of_number(value: Any) -> str:
    """Returns torch's dtype of a tensor that is filled with a number."""
    number(value)
    if isinstance(value, bool):
        return "bool"
    return "float32" if isinstance(value, float | Number) else "int64"


@operator("zeros", "ones")
def _zeros(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> TensorType:
    return TensorType(options("float32", dtype, layout, device, pin_memory), sizes(size))


@operator("full")
def _full(
    size: Any,
    fill_value: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> TensorType:
    return TensorType(options(dtype_of_number(fill_value), dtype, layout, device, pin_memory), sizes(size))


@operator("zeros_like", "ones_like")
def _zeros_like(
    self: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> TensorType:
    check_format(memory_format)
    given = tensor(self)
    return TensorType(options(given.dtype, dtype, layout, device, pin_memory), given.shape)


@operator("full_like")
def _full_like(self: Any, fill_value: Any, **given: Any) -> TensorType:
    number(fill_value)
    return _zeros_like(self, **given)


@operator("new_zeros", "new_ones")
def _new_zeros(
    self: Any, size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> TensorType:
    return TensorType(options(tensor(self).dtype, dtype, layout, device, pin_memory), sizes(size))


@operator("new_full")
def _new_full(self: Any, size: Any, fill_value: Any, **given: Any) -> TensorType:
    number(fill_value)
    return _new_zeros(self, size, **given)


@operator("scalar_tensor")
def _scalar_tensor(
    s: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> TensorType:
    number(s)
    return TensorType(options("float32", dtype, layout, device, pin_memory), ())


def _known(value: Any) -> float:
    require(isinstance(value, int | float) and not isinstance(value, bool), f"{value!r} is not a number that is known")
    require(math.isfinite(value) and abs(value) <= MAX_SIZE, f"{value} is too large for a range")
    return value


def _range(start: Any, end: Any, step: Any, given: dict[str, Any]) -> TensorType:
    first, last, stride = _known(start), _known(end), _known(step)
    require(stride != 0, "a range has a step")
    steps = (last - first) / stride
    require(0 <= steps <= MAX_SIZE, "a range ends beyond its start")
    whole = all(isinstance(value, int) for value in (first, last, stride))
    dtype = options("int64" if whole else "float32", **given)
    require(whole or category(dtype) == FLOAT, "a range of integers has whole bounds")
    return TensorType(dtype, (math.ceil(steps),))


@operator("arange")
def _arange(
    end: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> TensorType:
    return _arange_step(0, end, 1, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory)


@operator("arange.start", "arange.start_step")
def _arange_step(
    start: Any,
    end: Any,
    step: Any = 1,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> TensorType:
    given = {"dtype": dtype, "layout": layout, "device": device, "pin_memory": pin_memory}
    return _range(start, end, step, given)


@operator("linspace")
def _linspace(
    start: Any,
    end: Any,
    steps: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> TensorType:
    _known(start)
    _known(end)
    return TensorType(options("float32", dtype, layout, device, pin_memory), (integer(steps, 0),))


@operator("eye", "eye.m")
def _eye(
    n: Any,
    m: Any = None,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> TensorType:
    rows = integer(n, 0)
    columns = rows if m is None else integer(m, 0)
    return TensorType(options("float32", dtype, layout, device, pin_memory), (rows, columns))


@operator("copy")
def _copy(self: Any, src: Any, non_blocking: Any = False) -> TensorType:
    flag(non_blocking)
    given = tensor(self)
    require(broadcast(given.shape, tensor(src).shape) == given.shape, f"{src} is not copied into {given}")
    return given


@operator("fill.Scalar", "fill.Tensor")
def _fill(self: Any, value: Any) -> TensorType:
    if isinstance(value, TensorType):
        require(value.shape == (), "fill takes a value without dimensions")
    else:
        number(value)
    return tensor(self)


@operator("one_hot")
def _one_hot(self: Any, num_classes: Any = -1) -> TensorType:
    given = tensor(self)
    require(given.dtype == "int64", "one_hot takes classes as int64")
    return TensorType("int64", (*given.shape, integer(num_classes, 1)))
