"""Masks and counts that do not depend on the request, as positions: what they select then has a shape of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

#: Operators that take masks or counts which decide the result's shape.
SELECTS = {
    "aten.index.Tensor",
    "aten.index_put.default",
    "aten.index_put_.default",
    "aten.repeat_interleave.self_Tensor",
}


def by_position(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_marked: Callable[[Any], bool]
) -> tuple[Any, str, tuple[Any, ...], dict[str, Any]]:
    """Returns the same operation with positions instead of masks and counts, except for marked ones."""
    if name != "aten.repeat_interleave.self_Tensor":
        indices = [part for index in args[1] for part in _indices(index, is_marked)]
        return func, name, (args[0], indices, *args[2:]), dict(kwargs)
    given = dict(zip(("self", "repeats", "dim"), args, strict=False)) | dict(kwargs)
    tensor, repeats, dim = given["self"], given["repeats"], given.get("dim")
    if is_marked(repeats) or dim is None:
        return func, name, args, dict(kwargs)
    with _disable_current_modes():
        indices = torch.repeat_interleave(repeats.expand(tensor.shape[dim]))
    return torch.ops.aten.index_select.default, "aten.index_select.default", (tensor, dim, indices), {}


def _indices(index: torch.Tensor | None, is_marked: Callable[[Any], bool]) -> Sequence[torch.Tensor | None]:
    if index is None or index.dtype not in (torch.bool, torch.uint8) or is_marked(index):
        return [index]
    with _disable_current_modes():
        return index.nonzero(as_tuple=True)
