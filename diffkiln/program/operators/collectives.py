"""Types of what several processes compute together: own values, shards, and what they exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffkiln.program.ir import ALL_GATHER, FROM_FIRST, FROM_ONE, OWN, SHARD, TensorType
from diffkiln.program.operators.table import require


def shared_results(name: str, given: Sequence[TensorType], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
    """Returns the types of an operation's results.

    Args:
        name: OWN, SHARD, ALL_GATHER, ALL_TO_ALL, FROM_FIRST or FROM_ONE.
        given: the types of its arguments.
        attrs: the operation's, which are well formed.

    Raises:
        Refused: the arguments differ, or a size is not parted by the number of processes.
    """
    count, first = attrs["count"], given[0]
    if name == OWN:
        require(all(type_ == first for type_ in given), "its values have different types")
        return (first,)
    if name == FROM_FIRST:
        return (first,)
    if name == FROM_ONE:
        return tuple(given)
    if name == ALL_GATHER:
        return (first,) * count
    if name == SHARD:
        return (_parted(first, attrs["dim"], count),)
    parted = _parted(first, attrs["split"], count)
    return (_grown(parted, attrs["join"], count),)


def _parted(type_: TensorType, dim: int, count: int) -> TensorType:
    require(dim < len(type_.shape), f"{type_} has no dimension {dim}")
    size = type_.shape[dim]
    require(size > 0 and size % count == 0, f"dimension {dim} of {type_} is not parted by {count} processes")
    return _with_size(type_, dim, size // count)


def _grown(type_: TensorType, dim: int, count: int) -> TensorType:
    require(dim < len(type_.shape), f"{type_} has no dimension {dim}")
    return _with_size(type_, dim, type_.shape[dim] * count)


def _with_size(type_: TensorType, dim: int, size: int) -> TensorType:
    return replace(type_, shape=(*type_.shape[:dim], size, *type_.shape[dim + 1 :]))
