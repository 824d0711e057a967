"""Operators that repeat and pad."""

from __future__ import annotations

from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.shapes import like, ravelled, resized
from diffkiln.program.operators.table import (
    axis,
    integer,
    integers,
    number,
    one_of,
    operator,
    require,
    sizes,
    tensor,
)


@operator("repeat")
def _repeat(self: Any, repeats: Any) -> TensorType:
    given, times = tensor(self), sizes(repeats)
    require(len(times) >= len(given.shape), "repeat takes a number for each dimension")
    shape = (*[1] * (len(times) - len(given.shape)), *given.shape)
    return like(given, [size * count for size, count in zip(shape, times, strict=True)])


@operator("tile")
def _tile(self: Any, dims: Any) -> TensorType:
    times = sizes(dims)
    missing = len(tensor(self).shape) - len(times)
    return _repeat(self, (*[1] * max(missing, 0), *times))


@operator("repeat_interleave.self_int")
def _repeat_interleave(self: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> TensorType:
    given = tensor(self) if dim is not None else ravelled(self)
    at = axis(0 if dim is None else dim, len(given.shape))
    require(bool(given.shape), "a tensor without dimensions has nothing to repeat along")
    size = given.shape[at] * integer(repeats, 0)
    require(output_size in (None, size), f"output_size={output_size!r} is not {size}")
    return resized(given, at, size)


@operator("repeat_interleave.self_Tensor")
def _repeat_each(self: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> TensorType:
    """Checks the operands. torch believes `output_size`, so the interpreter selects positions that it clamps."""
    given, counts = tensor(self), tensor(repeats)
    require(dim is not None and bool(given.shape), "repeat_interleave takes the dimension")
    at = axis(dim, len(given.shape))
    require(counts.dtype in ("int32", "int64"), "repeats are integers")
    require(counts.shape == (given.shape[at],), "repeat_interleave takes a count for each place")
    return resized(given, at, integer(output_size, 0))


@operator("constant_pad_nd")
def _constant_pad(self: Any, pad: Any, value: Any = 0) -> TensorType:
    given, amounts = tensor(self), integers(pad)
    number(value)
    require(len(amounts) % 2 == 0 and len(amounts) <= 2 * len(given.shape), "padding comes in pairs, one a dimension")
    shape = list(given.shape)
    for index in range(len(amounts) // 2):
        at = len(shape) - 1 - index
        shape[at] += amounts[2 * index] + amounts[2 * index + 1]
        require(shape[at] >= 0, f"{given} is cut by more than it has")
        cut = -min(amounts[2 * index], 0) - min(amounts[2 * index + 1], 0)
        require(cut <= given.shape[at], f"{given} is cut by more than it has")
    return like(given, shape)


def _edge_pad(given: TensorType, amounts: tuple[int, ...], spatial: int, inside: bool) -> TensorType:
    require(len(amounts) == 2 * spatial, f"padding of {spatial} dimensions takes {2 * spatial} numbers")
    require(len(given.shape) in (spatial + 1, spatial + 2), f"{given} lacks the dimensions to pad")
    require(all(given.shape[-index - 1] > 0 for index in range(spatial)), f"{given} has no edge")
    require(min(amounts, default=0) >= 0, "padding by an edge is not negative")
    if inside:
        fits = all(max(amounts[2 * i : 2 * i + 2]) < given.shape[-1 - i] for i in range(spatial))
        require(fits, "padding by reflection is smaller than the size")
    return _constant_pad(given, amounts)


def _edge(spatial: int, inside: bool) -> Any:
    return lambda self, padding: _edge_pad(tensor(self), integers(padding), spatial, inside)


for _spatial in (1, 2, 3):
    operator(f"reflection_pad{_spatial}d")(_edge(_spatial, True))
    operator(f"replication_pad{_spatial}d")(_edge(_spatial, False))


@operator("_pad_circular")
def _pad_circular(self: Any, pad: Any) -> TensorType:
    given, amounts = tensor(self), integers(pad, 0)
    spatial = len(given.shape) - 2
    require(spatial >= 1 and len(amounts) == 2 * spatial, "circular padding takes two numbers a dimension")
    fits = all(max(amounts[2 * i : 2 * i + 2]) <= given.shape[-1 - i] for i in range(spatial))
    require(fits, "circular padding is at most the size")
    return _constant_pad(given, amounts)


@operator("pad")
def _pad(self: Any, pad: Any, mode: Any = "constant", value: Any = None) -> TensorType:
    one_of(mode, ("constant", "reflect", "replicate", "circular"))
    if mode == "constant":
        return _constant_pad(self, pad, 0 if value is None else value)
    require(value in (None, 0), "only constant padding has a value")
    if mode == "circular":
        return _pad_circular(self, pad)
    amounts = integers(pad)
    return _edge_pad(tensor(self), amounts, len(amounts) // 2, mode == "reflect")
