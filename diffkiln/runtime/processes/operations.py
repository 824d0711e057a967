"""The operations that several processes share, as the interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from diffkiln.interpreter.aten import Special
from diffkiln.program import ALL_GATHER, ALL_TO_ALL, FROM_FIRST, FROM_ONE, OWN, SHARD, Op
from diffkiln.runtime.processes.group import Group

_Run = Callable[..., Sequence[torch.Tensor]]


def shared_operations(group: Group | None) -> Mapping[str, Special]:
    """Returns what runs each operation that processes share; nothing without a group."""
    if group is None:
        return {}

    def own(op: Op) -> _Run:
        index = group.index(op.attrs["axis"])
        return lambda *values: [values[index]]

    def shard(op: Op) -> _Run:
        index, count, dim = group.index(op.attrs["axis"]), op.attrs["count"], op.attrs["dim"]
        return lambda value: [value.chunk(count, dim)[index]]

    def gather(op: Op) -> _Run:
        axis = op.attrs["axis"]
        return lambda value: group.gather(value, axis)

    def exchange(op: Op) -> _Run:
        axis, count, split, join = (op.attrs[name] for name in ("axis", "count", "split", "join"))
        return lambda value: [torch.cat(group.exchange(value.chunk(count, split), axis), join)]

    def first(_op: Op) -> _Run:
        return lambda value: [group.by_first(value)]

    def one(op: Op) -> _Run:
        axis, index = op.attrs["axis"], op.attrs["index"]
        return lambda *values: group.by_one(values, axis, index)

    return {
        FROM_FIRST: first,
        FROM_ONE: one,
        OWN: own,
        SHARD: shard,
        ALL_GATHER: gather,
        ALL_TO_ALL: exchange,
    }
