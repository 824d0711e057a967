"""Operators that give the same elements another shape, order or place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import DType, TensorType
from diffkiln.program.operators.creation import check_format, options
from diffkiln.program.operators.promotion import SIZES
from diffkiln.program.operators.table import (
    axes,
    axis,
    entries,
    flag,
    flags,
    integer,
    integers,
    operator,
    require,
    tensor,
)


def like(given: TensorType, shape: Sequence[int]) -> TensorType:
    """Returns the type with another shape."""
    return TensorType(given.dtype, tuple(shape))


def resized(given: TensorType, at: int, size: int) -> TensorType:
    """Returns the type with another size of one dimension."""
    return like(given, (*given.shape[:at], size, *given.shape[at + 1 :]))


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
    require(isinstance(dtype, DType) and dtype.name in SIZES, f"{dtype!r} is not a dtype of programs")
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
def ravelled(self: Any) -> TensorType:
    return like(tensor(self), (tensor(self).numel,))


@operator("unflatten.int", view=True)
def _unflatten(self: Any, dim: Any, sizes: Any) -> TensorType:
    given = tensor(self)
    at = axis(dim, len(given.shape))
    parts = _reshape(like(given, given.shape[at : at + 1]), sizes).shape
    return like(given, (*given.shape[:at], *parts, *given.shape[at + 1 :]))


@operator("squeeze", view=True)
def _squeeze(self: Any) -> TensorType:
    return like(tensor(self), [n for n in tensor(self).shape if n != 1])


@operator("squeeze.dim", "squeeze.dims", view=True)
def _squeeze_dims(self: Any, dim: Any) -> TensorType:
    given = tensor(self)
    chosen = axes(dim, len(given.shape))
    return like(given, [n for at, n in enumerate(given.shape) if n != 1 or at not in chosen])


def unsqueezed(self: Any, dim: Any) -> TensorType:
    given = tensor(self)
    at = axis(dim, len(given.shape) + 1)
    return like(given, (*given.shape[:at], 1, *given.shape[at:]))


operator("unsqueeze", view=True)(unsqueezed)
operator("unsqueeze_copy")(unsqueezed)


def _expand(self: Any, size: Any, *, implicit: Any = False) -> TensorType:
    given, wanted = tensor(self), integers(size, -1)
    flag(implicit)
    new = len(wanted) - len(given.shape)
    require(new >= 0, f"{given} is not expanded to fewer dimensions")
    shape = []
    for at, size_ in enumerate(wanted):
        old = given.shape[at - new] if at >= new else None
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
    return like(given, [given.shape[at] for at in order])


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
    listed = dict(zip(new, old, strict=True))
    rest = iter([at for at in range(rank) if at not in old])
    return like(given, [given.shape[listed[at] if at in listed else next(rest)] for at in range(rank)])


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
    channels, height, width = _image_of(given)
    return like(given, (*given.shape[:-3], channels // factor**2, height * factor, width * factor))


def _image_of(given: TensorType) -> list[int]:
    return [given.shape[at] for at in range(len(given.shape) - 3, len(given.shape))]


@operator("pixel_unshuffle")
def _pixel_unshuffle(self: Any, downscale_factor: Any) -> TensorType:
    given, factor = tensor(self), integer(downscale_factor, 1, 2**10)
    require(len(given.shape) >= 3, f"{given} is not an image")
    channels, height, width = _image_of(given)
    require(height % factor == 0 and width % factor == 0, f"{given} does not divide into squares of {factor}")
    return like(given, (*given.shape[:-3], channels * factor**2, height // factor, width // factor))


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
    flags(non_blocking, copy)
    check_format(memory_format)
    given = tensor(self)
    return TensorType(options(given.dtype, dtype, layout, device, pin_memory), given.shape)
