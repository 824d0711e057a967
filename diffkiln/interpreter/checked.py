"""Operators that torch leaves unchecked, in a form that is safe for every value of their tensors.

Types and literals are checked before a program runs (`diffkiln.program.inference`). What is left are values that only a
run shows: the counts of a repetition, indices on a GPU, and integers whose quotient no register holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: An operator's function → the function that runs in its place.
Check = Callable[[Callable[..., Any]], Callable[..., Any]]

_aten = torch.ops.aten


def checked(name: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns what runs in the place of an operator: the operator itself, where torch checks it.

    Args:
        name: such as "aten.index.Tensor".
        function: the operator.
        device: where it runs. Torch checks indices on a CPU. On a GPU a wrong index ends the process's use of the GPU.
    """
    if name in _CHECKS:
        return _CHECKS[name](function)
    if device.type not in ("cpu", "meta") and name in _INDICES:
        return _clamped(function, *_INDICES[name])
    return function


# -- integer division: the smallest integer divided by -1 has no quotient, and the processor traps --


def _whole(self: Any, other: Any) -> bool:
    return not (torch.result_type(self, other).is_floating_point or torch.result_type(self, other).is_complex)


def _division(quotient: bool) -> Check:
    """Returns a check for division. Division by -1 is a change of sign, which wraps like all of torch's integers."""

    def check(function: Callable[..., Any]) -> Callable[..., Any]:
        def divided(self: Any, other: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("rounding_mode", "") is None or not _whole(self, other):
                return function(self, other, **kwargs)
            if not isinstance(other, Tensor):
                if other != -1:
                    return function(self, other, **kwargs)
                return _aten.neg.default(self) if quotient else torch.zeros_like(self)
            negates = other == -1
            found = function(self, torch.where(negates, torch.ones_like(other), other), **kwargs)
            same = self.to(found.dtype) if isinstance(self, Tensor) else torch.full_like(found, self)
            return torch.where(negates, -same if quotient else torch.zeros_like(same), found)

        return divided

    return check


# -- a dense tensor by its strides --


def _strided(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the operator on a dense copy, since torch counts offsets from the storage's start, which may hold other
    tensors.
    """

    def viewed(self: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
        dense = self.contiguous()
        return function(dense, size, stride, (storage_offset or 0) + dense.storage_offset())

    return viewed


def _strided_scatter(function: Callable[..., Any]) -> Callable[..., Any]:
    def scattered(
        self: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
    ) -> Tensor:
        dense = self.contiguous()
        dense = dense.clone() if dense.storage_offset() else dense
        return function(dense, src, size, stride, storage_offset or 0)

    return scattered


# -- indices --


def _repeated(_function: Callable[..., Any]) -> Callable[..., Any]:
    """Selects positions, each of which lies in the tensor whatever the counts are. Torch believes `output_size`."""

    def repeated(self: Tensor, repeats: Tensor, dim: int, *, output_size: int) -> Tensor:
        ends = repeats.cumsum(0)
        taken = torch.searchsorted(ends, torch.arange(output_size, device=self.device, dtype=ends.dtype), right=True)
        return _aten.index_select.default(self, dim, taken.clamp(max=self.shape[dim] - 1))

    return repeated


#: The place of the indices among an operator's arguments, and the place of the dimension that they index.
_INDICES: dict[str, tuple[int, int | None]] = {
    "aten.embedding.default": (1, None),
    "aten.index_select.default": (2, 1),
    "aten.index_copy.default": (2, 1),
    "aten.index_add.default": (2, 1),
    "aten.index_fill.int_Scalar": (2, 1),
    "aten.index_fill.int_Tensor": (2, 1),
    "aten.gather.default": (2, 1),
    "aten.scatter.src": (2, 1),
    "aten.scatter.value": (2, 1),
    "aten.scatter.reduce": (2, 1),
    "aten.scatter_add.default": (2, 1),
    "aten.take_along_dim.default": (1, 2),
    "aten.index.Tensor": (1, None),
    "aten.index_put.default": (1, None),
}


def _clamped(function: Callable[..., Any], which: int, dim: int | None) -> Callable[..., Any]:
    """Returns the operator with each index moved to the nearest one that its dimension has."""

    def clamped(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        tensor, index = given[0], given[which]
        if isinstance(index, Tensor):
            given[which] = _within(index, tensor.shape[given[dim] if dim else 0] if tensor.ndim else 1)
        else:
            sizes = zip(index, tensor.shape, strict=False)
            given[which] = [None if one is None else _within(one, size) for one, size in sizes]
        return function(*given, **kwargs)

    return clamped


def _within(index: Tensor, size: int) -> Tensor:
    return index if index.dtype == torch.bool else index.clamp(-size, size - 1)


_CHECKS: dict[str, Check] = {
    "aten.as_strided.default": _strided,
    "aten.as_strided_scatter.default": _strided_scatter,
    "aten.repeat_interleave.self_Tensor": _repeated,
    **dict.fromkeys(
        (
            "aten.div.Tensor_mode",
            "aten.div.Scalar_mode",
            "aten.floor_divide.default",
            "aten.floor_divide.Scalar",
        ),
        _division(quotient=True),
    ),
    **dict.fromkeys(
        ("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.fmod.Tensor", "aten.fmod.Scalar"),
        _division(quotient=False),
    ),
}
