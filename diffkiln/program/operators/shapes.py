"""Operators that give the same elements another shape, order or place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import DType, TensorType
from diffkiln.program.operators.creation import check_format, options
from diffkiln.program.operators.promotion import SIZES, promote
from diffkiln.program.operators.table import (
    MAX_SIZE,
    axes,
    axis,
    broadcast,
    entries,
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

def like(given: TensorType, shape: Sequence[int]) -> TensorType:
    """Returns the type with another shape."""
    return TensorType(given.dtype, tuple(shape))


def resized(given: TensorType, place: int, size: int) -> TensorType:
    """Returns the type with another size of one dimension."""
    return like(given, (*given.shape[:place], size, *given.shape[place + 1 :]))


def _same(self: Any) -> TensorType:
    return tensor(self)


entries("alias detach lift_fresh resolve_conj resolve_neg", _same, view=True)
entries("lift_fresh_copy", _same)


@operator("contiguous")
def _contiguous(self: Any, *, memory_format: Any = None) -> TensorType:
    return _clone(self, memory_format=memory_format)


@operator("clone")
def _clone(self: Any, *, memory_format: Any = None) -> TensorType:
    check_format(memory_format)
    return tensor(self)


# -- shapes --


@operator("reshape", "view", "view_copy")
def _reshape(self: Any, shape: Any = None, *, size: Any = None) -> TensorType:
    given = tensor(self)
    wanted = list(integers(shape if size is None else size, -1))
    if -1 in wanted:
        require(wanted.count(-1) == 1, "only one size may be -1")
        known = math.prod(n for n in wanted if n != -1)
        require(known > 0 and given.numel % known == 0, f"{given} has no shape {wanted}")
        wanted[wanted.index(-1)] = given.numel // known
    require(math.prod(wanted) == given.numel, f"{given} has no shape {wanted}")
    return like(given, wanted)


@operator("view.dtype", view=True)
def _view_dtype(self: Any, dtype: Any) -> TensorType:
    given = tensor(self)
    require(isinstance(dtype, DType) and dtype.name in SIZES, f"{dtype!r} is no dtype of programs")
    require(dtype.name != "bool", "bytes are not viewed as booleans, which have two values alone")
    old, new = SIZES[given.dtype], SIZES[dtype.name]
    if old == new:
        return TensorType(dtype.name, given.shape)
    require(bool(given.shape) and given.shape[-1] * old % new == 0, f"{given} has no view of {dtype.name}")
    return TensorType(dtype.name, (*given.shape[:-1], given.shape[-1] * old // new))


@operator("view_as", "reshape_as", "expand_as")
def _as_other(self: Any, other: Any) -> TensorType:
    wanted = tensor(other).shape
    given = tensor(self)
    same = given.numel == math.prod(wanted)
    return like(given, wanted) if same else _expand(self, wanted)


@operator("flatten.using_ints")
def _flatten(self: Any, start_dim: Any = 0, end_dim: Any = -1) -> TensorType:
    given = tensor(self)
    rank = len(given.shape)
    first, last = axis(start_dim, rank), axis(end_dim, rank)
    require(first <= last, "flatten ends before it starts")
    if rank == 0:
        return like(given, (1,))
    joined = math.prod(given.shape[first : last + 1])
    return like(given, (*given.shape[:first], joined, *given.shape[last + 1 :]))


@operator("ravel")
def _ravel(self: Any) -> TensorType:
    return like(tensor(self), (tensor(self).numel,))


@operator("unflatten.int", view=True)
def _unflatten(self: Any, dim: Any, sizes: Any) -> TensorType:
    given = tensor(self)
    place = axis(dim, len(given.shape))
    parts = _reshape(like(given, given.shape[place : place + 1]), sizes).shape
    return like(given, (*given.shape[:place], *parts, *given.shape[place + 1 :]))


@operator("squeeze", view=True)
def _squeeze(self: Any) -> TensorType:
    return like(tensor(self), [n for n in tensor(self).shape if n != 1])


@operator("squeeze.dim", "squeeze.dims", view=True)
def _squeeze_dims(self: Any, dim: Any) -> TensorType:
    given = tensor(self)
    chosen = axes(dim, len(given.shape))
    return like(given, [n for place, n in enumerate(given.shape) if n != 1 or place not in chosen])


def _unsqueeze(self: Any, dim: Any) -> TensorType:
    given = tensor(self)
    place = axis(dim, len(given.shape) + 1)
    return like(given, (*given.shape[:place], 1, *given.shape[place:]))


operator("unsqueeze", view=True)(_unsqueeze)
operator("unsqueeze_copy")(_unsqueeze)


def _expand(self: Any, size: Any, *, implicit: Any = False) -> TensorType:
    given, wanted = tensor(self), integers(size, -1)
    flag(implicit)
    new = len(wanted) - len(given.shape)
    require(new >= 0, f"{given} is not expanded to fewer dimensions")
    shape = []
    for place, size_ in enumerate(wanted):
        old = given.shape[place - new] if place >= new else None
        require(size_ >= 0 or old is not None, "a new dimension has no size to keep")
        require(size_ in (old, -1) or old in (1, None), f"{given} is not expanded to {wanted}")
        shape.append(old if size_ == -1 else size_)
    return like(given, shape)


operator("expand", "broadcast_to", view=True)(_expand)
operator("expand_copy")(_expand)


# -- the order of dimensions --


def _permute(self: Any, dims: Any) -> TensorType:
    given = tensor(self)
    order = axes(dims, len(given.shape))
    require(len(order) == len(given.shape), "permute names each dimension once")
    return like(given, [given.shape[place] for place in order])


operator("permute", view=True)(_permute)
operator("permute_copy")(_permute)


@operator("transpose.int", view=True)
def _transpose(self: Any, dim0: Any, dim1: Any) -> TensorType:
    given = tensor(self)
    a, b = axis(dim0, len(given.shape)), axis(dim1, len(given.shape))
    if not given.shape:
        return given
    shape = list(given.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return like(given, shape)


@operator("swapaxes", view=True)
def _swapaxes(self: Any, axis0: Any, axis1: Any) -> TensorType:
    return _transpose(self, axis0, axis1)


@operator("t", view=True)
def _t(self: Any) -> TensorType:
    require(len(tensor(self).shape) <= 2, "t takes at most two dimensions")
    return like(tensor(self), tensor(self).shape[::-1])


@operator("numpy_T", view=True)
def _numpy_t(self: Any) -> TensorType:
    return like(tensor(self), tensor(self).shape[::-1])


@operator("mT", "mH", "adjoint")
def _matrix_transposed(self: Any) -> TensorType:
    require(len(tensor(self).shape) >= 2, "a matrix has two dimensions")
    return _transpose(self, -2, -1)


@operator("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist", view=True)
def _movedim(self: Any, source: Any, destination: Any) -> TensorType:
    given = tensor(self)
    rank = len(given.shape)
    old, new = axes(source, rank), axes(destination, rank)
    require(len(old) == len(new), "as many dimensions are moved as there are places for them")
    if rank == 0:
        return given
    placed = dict(zip(new, old, strict=True))
    rest = iter([place for place in range(rank) if place not in old])
    return like(given, [given.shape[placed[place] if place in placed else next(rest)] for place in range(rank)])


@operator("flip")
def _flip(self: Any, dims: Any) -> TensorType:
    axes(dims, len(tensor(self).shape))
    return tensor(self)


@operator("roll")
def _roll(self: Any, shifts: Any, dims: Any = ()) -> TensorType:
    given = tensor(self)
    moved, along = integers(shifts), integers(dims, -len(given.shape), len(given.shape) - 1)
    require(len(moved) == len(along) or (len(moved) == 1 and not along), "roll takes a shift for each dimension")
    return given


@operator("rot90")
def _rot90(self: Any, k: Any = 1, dims: Any = (0, 1)) -> TensorType:
    given = tensor(self)
    order = axes(dims, len(given.shape))
    require(len(order) == 2, "a rotation has two dimensions")
    return _transpose(given, *order) if integer(k) % 2 else given


@operator("channel_shuffle")
def _channel_shuffle(self: Any, groups: Any) -> TensorType:
    given = tensor(self)
    require(len(given.shape) > 2 and given.shape[1] % integer(groups, 1) == 0, "channels are divided into groups")
    return given


@operator("pixel_shuffle")
def _pixel_shuffle(self: Any, upscale_factor: Any) -> TensorType:
    given, factor = tensor(self), integer(upscale_factor, 1, 2**10)
    require(len(given.shape) >= 3 and given.shape[-3] % factor**2 == 0, f"{given} has no pixels to shuffle")
    *batch, channels, height, width = given.shape
    return like(given, (*batch, channels // factor**2, height * factor, width * factor))


@operator("pixel_unshuffle")
def _pixel_unshuffle(self: Any, downscale_factor: Any) -> TensorType:
    given, factor = tensor(self), integer(downscale_factor, 1, 2**10)
    require(len(given.shape) >= 3, f"{given} is no image")
    *batch, channels, height, width = given.shape
    require(height % factor == 0 and width % factor == 0, f"{given} does not divide into squares of {factor}")
    return like(given, (*batch, channels * factor**2, height // factor, width // factor))


# -- parts --

_FAR = 2**63 - 1
#: Each part is a value of its own.
MAX_PARTS = 2**12


def _slice(self: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no slices")
    place = axis(dim, len(given.shape))
    first = integer(0 if start is None else start, -_FAR - 1, _FAR)
    last = integer(_FAR if end is None else end, -_FAR - 1, _FAR)
    count = len(range(given.shape[place])[first : max(last, -_FAR) : integer(step, 1, MAX_SIZE)])
    return resized(given, place, count)


operator("slice.Tensor", view=True)(_slice)


@operator("select.int", view=True)
def _select(self: Any, dim: Any, index: Any) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    place = axis(dim, len(given.shape))
    integer(index, -given.shape[place], given.shape[place] - 1)
    return like(given, (*given.shape[:place], *given.shape[place + 1 :]))


@operator("narrow", view=True)
def _narrow(self: Any, dim: Any, start: Any, length: Any) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions has no parts")
    place = axis(dim, len(given.shape))
    size = given.shape[place]
    first = integer(start, -size, size)
    first = first + size if first < 0 else first
    return resized(given, place, integer(length, 0, size - first))


def _pieces(given: TensorType, dim: Any, lengths: Sequence[int]) -> list[TensorType]:
    place = axis(dim, len(given.shape))
    require(sum(lengths) == given.shape[place], f"parts of {tuple(lengths)} are not the whole of {given}")
    return [resized(given, place, length) for length in lengths]


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
    place = axis(dimension, len(given.shape))
    window = integer(size, 0, given.shape[place])
    count = (given.shape[place] - window) // integer(step, 1) + 1
    return like(given, (*resized(given, place, count).shape, window))


@operator("diagonal", view=True)
def _diagonal(self: Any, offset: Any = 0, dim1: Any = 0, dim2: Any = 1) -> TensorType:
    given = tensor(self)
    a, b = axes((dim1, dim2), len(given.shape))
    shift = integer(offset)
    rows, columns = given.shape[a] + min(shift, 0), given.shape[b] - max(shift, 0)
    rest = [n for place, n in enumerate(given.shape) if place not in (a, b)]
    return like(given, (*rest, max(min(rows, columns), 0)))


@operator("diag_embed")
def _diag_embed(self: Any, offset: Any = 0, dim1: Any = -2, dim2: Any = -1) -> TensorType:
    given = tensor(self)
    require(bool(given.shape), "a tensor without dimensions is no diagonal")
    a, b = axes((dim1, dim2), len(given.shape) + 1)
    side = given.shape[-1] + abs(integer(offset, -MAX_SIZE, MAX_SIZE))
    rest = iter(given.shape[:-1])
    return like(given, [side if place in (a, b) else next(rest) for place in range(len(given.shape) + 1)])


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
    place = axis(dim, rank)
    rest = {(*part.shape[:place], *part.shape[place + 1 :]) for part in kept}
    require(len(rest) == 1, "parts of a concatenation differ in one dimension alone")
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = promote(dtype, part.dtype)
    return TensorType(dtype, resized(kept[0], place, sum(part.shape[place] for part in kept)).shape)


def _list(values: Any) -> list[TensorType]:
    return tensors(values)


@operator("stack")
def _stack(tensors: Any, dim: Any = 0) -> TensorType:
    return _cat(tuple(_unsqueeze(part, dim) for part in _list(tensors)), dim)


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
    flag(batch_first), number(padding_value), one_of(padding_side, ("left", "right"))
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


# -- repetition and padding --


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
    given = tensor(self) if dim is not None else _ravel(self)
    place = axis(0 if dim is None else dim, len(given.shape))
    require(bool(given.shape), "a tensor without dimensions has nothing to repeat along")
    size = given.shape[place] * integer(repeats, 0)
    require(output_size in (None, size), f"output_size={output_size!r} is not {size}")
    return resized(given, place, size)


@operator("repeat_interleave.self_Tensor")
def _repeat_each(self: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> TensorType:
    """The interpreter selects positions that it clamps, as torch believes `output_size`."""
    given, counts = tensor(self), tensor(repeats)
    require(dim is not None and bool(given.shape), "repeat_interleave takes the dimension")
    place = axis(dim, len(given.shape))
    require(counts.dtype in ("int32", "int64"), "repeats are integers")
    require(counts.shape == (given.shape[place],), "repeat_interleave takes a count for each place")
    return resized(given, place, integer(output_size, 0))


@operator("constant_pad_nd")
def _constant_pad(self: Any, pad: Any, value: Any = 0) -> TensorType:
    given, amounts = tensor(self), integers(pad)
    number(value)
    require(len(amounts) % 2 == 0 and len(amounts) <= 2 * len(given.shape), "padding comes in pairs, one a dimension")
    shape = list(given.shape)
    for index in range(len(amounts) // 2):
        place = len(shape) - 1 - index
        shape[place] += amounts[2 * index] + amounts[2 * index + 1]
        require(shape[place] >= 0, f"{given} is cut by more than it has")
        cut = -min(amounts[2 * index], 0) - min(amounts[2 * index + 1], 0)
        require(cut <= given.shape[place], f"{given} is cut by more than it has")
    return like(given, shape)


def _edge_pad(given: TensorType, amounts: tuple[int, ...], spatial: int, inside: bool) -> TensorType:
    require(len(amounts) == 2 * spatial, f"padding of {spatial} dimensions takes {2 * spatial} numbers")
    require(len(given.shape) in (spatial + 1, spatial + 2), f"{given} has not the dimensions to pad")
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


# -- dtypes and devices --


@operator("to.dtype")
def _to_dtype(
    self: Any, dtype: Any, non_blocking: Any = False, copy: Any = False, memory_format: Any = None
) -> TensorType:
    return _to(self, dtype=dtype, non_blocking=non_blocking, copy=copy, memory_format=memory_format)


@operator("to.device")
def _to_device(
    self: Any, device: Any, dtype: Any, non_blocking: Any = False, copy: Any = False, memory_format: Any = None
) -> TensorType:
    return _to(self, dtype=dtype, device=device, non_blocking=non_blocking, copy=copy, memory_format=memory_format)


@operator("to.other")
def _to_other(
    self: Any, other: Any, non_blocking: Any = False, copy: Any = False, memory_format: Any = None
) -> TensorType:
    dtype = DType(tensor(other).dtype)
    return _to(self, dtype=dtype, non_blocking=non_blocking, copy=copy, memory_format=memory_format)


@operator("to.dtype_layout", "_to_copy")
def _to(
    self: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: Any = False,
    copy: Any = False,
    memory_format: Any = None,
) -> TensorType:
    flag(non_blocking), flag(copy)
    check_format(memory_format)
    given = tensor(self)
    return TensorType(options(given.dtype, dtype, layout, device, pin_memory), given.shape)


# -- strides --


@operator("as_strided", view=True)
def _as_strided(self: Any, size: Any, stride: Any, storage_offset: Any = None) -> TensorType:
    """A view of a dense tensor, whose last element lies within it. The interpreter makes the tensor dense."""
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
def _slice_scatter(
    self: Any, src: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> TensorType:
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
