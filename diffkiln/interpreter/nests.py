"""Tensors in the arguments and results of operators: alone, or in lists, tuples and dicts within each other.

torch's own pytree does as much for more types, and is private to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def same_geometry(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns True if two tensors of one storage have the same shape, stride and offset."""
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def tensors_in(nest: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from tensors_in(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from tensors_in(item)


def map_tensors(nest: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns the same nest with each tensor changed."""
    if isinstance(nest, torch.Tensor):
        return change(nest)
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(item, change) for item in nest)
    if isinstance(nest, dict):
        return {key: map_tensors(item, change) for key, item in nest.items()}
    return nest
