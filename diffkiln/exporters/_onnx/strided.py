"""Views by strides, and writes through them, as slices and concatenations: what other formats have of them.

A module that writes `out[..., 0::2] = x` is recorded as a write through a view of `out`'s dense storage. The storage
seen as a box, with an axis for each stride, the view is a range of every axis:

    16 heads of 8 pairs, the first of each pair    size (16, 8), stride (16, 2), offset 0
    the box                                        (16, 8, 2), of which (0:16, 0:8, 0:1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkiln.interpreter.aten import Special, overload
from diffkiln.interpreter.checked import checked
from diffkiln.program import Op

Sizes = Sequence[int]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Box:
    """A dense storage as a box, and the part of it that a view shows.

    Attributes:
        shape: of the box.
        starts, lengths: of the part, by axis.
        order: the view's dimensions of more than one element, by the axes that they lie in.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]


def box_of(count: int, size: Sizes, stride: Sizes, offset: int) -> Box | None:
    """Returns the box of `count` elements in which a view is a range of every axis; None if there is none."""
    order = sorted((i for i, n in enumerate(size) if n != 1), key=lambda i: -stride[i])
    shape, starts, lengths = [], [], []
    for i in order:
        step = stride[i]
        if step < 1 or count % step or offset // step + size[i] > count // step:
            return None
        shape.append(count // step)
        starts.append(offset // step)
        lengths.append(size[i])
        count, offset = step, offset % step
    return Box((*shape, count), (*starts, offset), (*lengths, 1), tuple(order))


def read(base: Tensor, box: Box, size: Sizes) -> Tensor:
    """Returns the content of the view."""
    part = base.reshape(box.shape)
    for axis, (start, length) in enumerate(zip(box.starts, box.lengths, strict=True)):
        part = part.narrow(axis, start, length)
    order = [box.order.index(i) for i in sorted(box.order)]
    return part.squeeze(-1).permute(order).reshape(tuple(size))


def written(base: Tensor, source: Tensor, box: Box) -> Tensor:
    """Returns the storage with other content in the place of the view."""
    dense = source.reshape([n for n in source.shape if n != 1])
    rank = {dimension: at for at, dimension in enumerate(sorted(box.order))}
    part = dense.permute([rank[i] for i in box.order]).unsqueeze(-1)
    return _put(base.reshape(box.shape), part, box, 0).reshape(base.shape)


def _put(whole: Tensor, part: Tensor, box: Box, axis: int) -> Tensor:
    if axis == len(box.shape):
        return part
    start, length, total = box.starts[axis], box.lengths[axis], box.shape[axis]
    if length == total:
        return _put(whole, part, box, axis + 1)
    end = start + length
    pieces = [whole.narrow(axis, 0, start)] if start else []
    pieces.append(_put(whole.narrow(axis, start, length), part, box, axis + 1))
    if end != total:
        pieces.append(whole.narrow(axis, end, total - end))
    return torch.cat(pieces, axis)


def _as_strided(op: Op) -> Callable[..., Sequence[Tensor]]:
    strided = checked(op.name, overload(op.name), _CPU)

    def run(base: Tensor, size: Sizes, stride: Sizes, offset: int = 0) -> Sequence[Tensor]:
        box = box_of(base.numel(), size, stride, offset)
        return (read(base.contiguous(), box, size) if box else strided(base, size, stride, offset),)

    return run


def _as_strided_scatter(op: Op) -> Callable[..., Sequence[Tensor]]:
    strided = checked(op.name, overload(op.name), _CPU)

    def run(base: Tensor, source: Tensor, size: Sizes, stride: Sizes, offset: int = 0) -> Sequence[Tensor]:
        box = box_of(base.numel(), size, stride, offset)
        return (written(base.contiguous(), source, box) if box else strided(base, source, size, stride, offset),)

    return run


#: By the names of the operators whose place they take. What fits no box stays the operator that it was.
STRIDED: Mapping[str, Special] = {
    "aten.as_strided.default": _as_strided,
    "aten.as_strided_scatter.default": _as_strided_scatter,
}
