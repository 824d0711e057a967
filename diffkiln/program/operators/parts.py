"""Operators that take parts of tensors, put parts into them, and join them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.promotion import promote
from diffkiln.program.operators.shapes import like, resized, unsqueezed
from diffkiln.program.operators.table import (
    MAX_SIZE,
    axes,
    axis,
    broadcast,
    flag,
    integer,
    integers,
    number,
    one_of,
    operator,
    require,
    sizes,
    tensor,
    tensors,
)

_FAR = 2**63 - 1
#: Each part is a value of its own.
MAX_PARTS = 2**12


def _slice(self: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no slices")
    at = axis(dim, len(given.shape))
    first = integer(0 if start is None else start, -_FAR - 1, _FAR)
    last = integer(_FAR if end is None else end, -_FAR - 1, _FAR)
    count = len(range(given.shape[at])[first : max(last, -_FAR) : integer(step, 1, MAX_SIZE)])
    return resized(given, at, count)


operator("slice.Tensor", view=True)(_slice)


@operator("select.int", view=True)
def _select(self: Any, dim: Any, index: Any) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    at = axis(dim, len(given.shape))
    integer(index, -given.shape[at], given.shape[at] - 1)
    return like(given, (*given.shape[:at], *given.shape[at + 1 :]))


@operator("narrow", view=True)
def _narrow(self: Any, dim: Any, start: Any, length: Any) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    at = axis(dim, len(given.shape))
    size = given.shape[at]
    first = integer(start, -size, size)
    first = first + size if first < 0 else first
    return resized(given, at, integer(length, 0, size - first))


def _pieces(given: TensorType, dim: Any, lengths: Sequence[int]) -> list[TensorType]:
    at = axis(dim, len(given.shape))
    require(sum(lengths) == given.shape[at], f"parts of {tuple(lengths)} are not the whole of {given}")
    return [resized(given, at, length) for length in lengths]


@operator("split.Tensor", "unsafe_split.Tensor", view=True)
def _split(self: Any, split_size: Any, dim: Any = 0) -> list[TensorType]:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    size, length = given.shape[axis(dim, len(given.shape))], integer(split_size, 1)
    require(size // length < MAX_PARTS, f"a split gives at most {MAX_PARTS} parts")
    whole, rest = divmod(size, length)
    lengths = [length] * whole + [rest] * (rest > 0)
    return _pieces(given, dim, lengths or [0])


@operator("split_with_sizes", "unsafe_split_with_sizes", "split", view=True)
def _split_with_sizes(self: Any, split_sizes: Any, dim: Any = 0) -> list[TensorType]:
    require(bool(tensor(self).shape), "a tensor without dimensions has no parts")
    return _pieces(tensor(self), dim, integers(split_sizes, 0))


@operator("split.sizes", view=True)
def _split_sizes(self: Any, split_size: Any, dim: Any = 0) -> list[TensorType]:
    return _split_with_sizes(self, split_size, dim)


@operator("chunk", "unsafe_chunk", view=True)
def _chunk(self: Any, chunks: Any, dim: Any = 0) -> list[TensorType]:
    given, count = tensor(self), integer(chunks, 1, MAX_PARTS)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    size = given.shape[axis(dim, len(given.shape))]
    if size == 0:
        return _pieces(given, dim, [0] * count)
    return _split(given, -(-size // count), dim)


@operator("tensor_split.sections", view=True)
def _tensor_split(self: Any, sections: Any, dim: Any = 0) -> list[TensorType]:
    given, count = tensor(self), integer(sections, 1, MAX_PARTS)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    length, longer = divmod(given.shape[axis(dim, len(given.shape))], count)
    return _pieces(given, dim, [length + (index < longer) for index in range(count)])


@operator("unbind.int", view=True)
def _unbind(self: Any, dim: Any = 0) -> list[TensorType]:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    size = given.shape[axis(dim, len(given.shape))]
    require(size <= MAX_PARTS, f"unbind gives at most {MAX_PARTS} parts")
    return [_select(given, dim, 0)] * size


@operator("unfold", view=True)
def _unfold(self: Any, dimension: Any, size: Any, step: Any) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no windows")
    at = axis(dimension, len(given.shape))
    window = integer(size, 0, given.shape[at])
    count = (given.shape[at] - window) // integer(step, 1) + 1
    return like(given, (*resized(given, at, count).shape, window))


@operator("diagonal", view=True)
def _diagonal(self: Any, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> TensorType:
    given = tensor(self)
    a, b = axes((dim1, dim2), len(given.shape))
    shift = integer(offset)
    rows, columns = given.shape[a] + min(shift, 0), given.shape[b] - max(shift, 0)
    rest = [n for at, n in enumerate(given.shape) if at not in (a, b)]
    return like(given, (*rest, max(min(rows, columns), 0)))


@operator("diag_embed")
def _diag_embed(self: Any, offset: Any = 0, dim1: Any = -2, dim2: Any = -1) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions is not a diagonal")
    a, b = axes((dim1, dim2), len(given.shape) + 1)
    side = given.shape[-1] + abs(integer(offset, -MAX_SIZE, MAX_SIZE))
    rest = iter(given.shape[:-1])
    return like(given, [side if at in (a, b) else next(rest) for at in range(len(given.shape) + 1)])


@operator("tril", "triu")
def _triangle(self: Any, diagonal: Any = 0) -> TensorType:
    integer(diagonal)
    require(len(tensor(self).shape) >= 2, "a matrix has two dimensions")
    return tensor(self)


# -- several tensors --


@operator("cat", "concat", "concatenate")
def _cat(tensors: Any, dim: Any = 0) -> TensorType:
    parts = _list(tensors)
    kept = [part for part in parts if part.shape != (0,)] or parts[:1]
    rank = len(kept[0].shape)
    require(rank > 0 and all(len(part.shape) == rank for part in kept), "parts of a concatenation have one rank")
    at = axis(dim, rank)
    rest = {(*part.shape[:at], *part.shape[at + 1 :]) for part in kept}
    require(len(rest) == 1, "parts of a concatenation differ in one dimension alone")
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = promote(dtype, part.dtype)
    return TensorType(dtype, resized(kept[0], at, sum(part.shape[at] for part in kept)).shape)


def _list(values: Any) -> list[TensorType]:
    return tensors(values)


@operator("stack")
def _stack(tensors: Any, dim: Any = 0) -> TensorType:
    return _cat(tuple(unsqueezed(part, dim) for part in _list(tensors)), dim)


def _at_least(given: TensorType, rank: int) -> TensorType:
    missing = rank - len(given.shape)
    if missing <= 0:
        return given
    if rank == 3 and missing == 1:
        return like(given, (*given.shape, 1))
    if rank == 3 and missing == 2:
        return like(given, (1, *given.shape, 1))
    return like(given, (*[1] * missing, *given.shape))


@operator("hstack")
def _hstack(tensors: Any) -> TensorType:
    parts = tuple(_at_least(part, 1) for part in _list(tensors))
    return _cat(parts, 0 if len(parts[0].shape) == 1 else 1)


@operator("vstack")
def _vstack(tensors: Any) -> TensorType:
    return _cat(tuple(_at_least(part, 2) for part in _list(tensors)), 0)


def _at_least_as(rank: int) -> Any:
    return lambda self: _at_least(tensor(self), rank)


for _rank in (1, 2, 3):
    operator(f"atleast_{_rank}d")(_at_least_as(_rank))


@operator("pad_sequence")
def _pad_sequence(
    sequences: Any, batch_first: Any = False, padding_value: Any = 0.0, padding_side: Any = "right"
) -> TensorType:
    parts = _list(sequences)
    number(padding_value)
    flag(batch_first)
    one_of(padding_side, ("left", "right"))
    require(all(part.shape and part.shape[1:] == parts[0].shape[1:] for part in parts), "sequences differ in length")
    longest = max(part.shape[0] for part in parts)
    lead = (len(parts), longest) if batch_first else (longest, len(parts))
    return like(parts[0], (*lead, *parts[0].shape[1:]))


@operator("meshgrid", view=True)
def _meshgrid(tensors: Any) -> list[TensorType]:
    return _meshgrid_indexing(tensors, indexing="ij")


@operator("meshgrid.indexing", view=True)
def _meshgrid_indexing(tensors: Any, *, indexing: Any) -> list[TensorType]:
    parts = _list(tensors)
    one_of(indexing, ("ij", "xy"))
    require(all(len(part.shape) <= 1 for part in parts), "meshgrid takes at most one dimension of each")
    shape = [part.numel for part in parts]
    if indexing == "xy" and len(shape) > 1:
        shape[:2] = shape[1::-1]
    return [like(part, shape) for part in parts]


@operator("broadcast_tensors", view=True)
def _broadcast_tensors(tensors: Any) -> list[TensorType]:
    parts = _list(tensors)
    shape = broadcast(*(part.shape for part in parts))
    return [like(part, shape) for part in parts]


# -- strides --


@operator("as_strided", view=True)
def _as_strided(self: Any, size: Any, stride: Any, storage_offset: Any = None) -> TensorType:
    """Checks that the last element of a view lies within its dense tensor. The interpreter makes the tensor dense."""
    given, shape, strides = tensor(self), sizes(size), integers(stride, 0)
    start = integer(0 if storage_offset is None else storage_offset, 0)
    require(len(shape) == len(strides), "a view has a stride for each size")
    last = start + sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    require(0 in shape or last < given.numel, f"a view of {given} ends at element {last}")
    return like(given, shape)


@operator("as_strided_scatter")
def _as_strided_scatter(self: Any, src: Any, size: Any, stride: Any, storage_offset: Any = None) -> TensorType:
    part = _as_strided(self, size, stride, storage_offset)
    require(tensor(src).shape == part.shape, f"{src} is not what a view of {part} takes")
    return tensor(self)


@operator("slice_scatter")
def _slice_scatter(self: Any, src: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> TensorType:
    part = _slice(self, dim, start, end, step)
    require(tensor(src).shape == part.shape, f"{src} is not what a slice of {part} takes")
    return tensor(self)


@operator("select_scatter")
def _select_scatter(self: Any, src: Any, dim: Any, index: Any) -> TensorType:
    require(tensor(src).shape == _select(self, dim, index).shape, f"{src} is not the part that is replaced")
    return tensor(self)


@operator("diagonal_scatter")
def _diagonal_scatter(self: Any, src: Any, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> TensorType:
    require(tensor(src).shape == _diagonal(self, offset, dim1, dim2).shape, f"{src} is not the diagonal")
    return tensor(self)
