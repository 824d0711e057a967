"""Attention of which every process has some tokens: it gets all tokens of some heads, and gives its tokens back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffkiln.passes.sequencing.layout import Layout, local
from diffkiln.passes.sequencing.sharing import Sharing
from diffkiln.program import ALL_TO_ALL, ATTENTION, SHARD, Op, Ref, TensorType
from diffkiln.program.mesh import SEQUENCE

#: Of queries, keys and values [batch, heads, tokens, channels].
_BATCH, _HEADS, _TOKENS = 0, 1, 2


class Attending:
    """The writer of attentions in one program.

    Attributes:
        split: how many attentions exchange heads for tokens.
        reached: whether the queries of any come in shards of tokens.
    """

    def __init__(self) -> None:
        self.split, self.reached = 0, False

    def __call__(self, sharing: Sharing, op: Op) -> bool:
        """Writes an attention; False if it has to be given whole values.

        Raises:
            ValueError: the heads cannot be shared evenly.
        """
        query, key, value = (arg for arg in op.args[:3] if isinstance(arg, Ref))
        own, keys, values = (_tokens(sharing, ref) for ref in (query, key, value))
        if own is None:
            return False
        self.reached = True
        if keys is None and values is None and not {key.name, value.name} & sharing.layouts.keys():
            return _local(sharing, op, own)
        if keys is None or values is None or (_causal(op) and max(len(own.segments), len(keys.segments)) > 1):
            return False
        if keys != values:
            values = keys
        for ref in (query, key):
            heads = sharing.program.types[ref.name].shape[_HEADS]
            if heads % sharing.count:
                raise ValueError(
                    f"the attention of {sharing.program.name} has {heads} heads, which {sharing.count} processes "
                    "cannot share evenly. Choose a number of processes that divides them"
                )
        self.split += 1
        _exchanged(sharing, op, own, keys)
        return True


def _tokens(sharing: Sharing, ref: Ref) -> Layout | None:
    """Returns the layout of a value in shards of tokens; None if it is none of these."""
    layout = sharing.layouts.get(ref.name)
    return layout if layout is not None and layout.dim == _TOKENS and len(sharing.types[ref.name].shape) == 4 else None


def _causal(op: Op) -> bool:
    if op.name == ATTENTION:
        return bool(op.attrs["causal"])
    return bool(op.args[5] if len(op.args) > 5 else op.kwargs.get("is_causal", False))


def _mask(op: Op) -> Ref | None:
    found: Any = None
    if op.name != ATTENTION:
        found = op.args[3] if len(op.args) > 3 else op.kwargs.get("attn_mask")
    return found if isinstance(found, Ref) else None


def _with(op: Op, first: tuple[Ref, ...], mask: Ref | None) -> Op:
    """Returns an attention with other values and another mask."""
    rest, kwargs = list(op.args[3:]), dict(op.kwargs)
    if mask is not None and rest:
        rest[0] = mask
    elif mask is not None:
        kwargs["attn_mask"] = mask
    return replace(op, args=(*first, *rest), kwargs=kwargs)


def _local(sharing: Sharing, op: Op, own: Layout) -> bool:
    """Writes an attention of own queries to keys that every process has: nothing is exchanged."""
    mask = _mask(op)
    if _causal(op):
        return False
    if mask is not None:
        shape = sharing.program.types[mask.name].shape
        by_query = len(shape) > 1 and shape[-2] == own.size and shape[-2] > 1
        mask = sharing.value(mask, own.at(len(shape) - 2) if by_query else None)
    query, key, value = (arg for arg in op.args[:3] if isinstance(arg, Ref))
    sharing.add(_with(op, (query, key, value), mask), [own])
    return True


def _exchanged(sharing: Sharing, op: Op, own: Layout, keys: Layout) -> None:
    """Writes an attention of all tokens and own heads, between two exchanges."""
    count, name = sharing.count, op.outputs[0]
    query, key, value = (arg for arg in op.args[:3] if isinstance(arg, Ref))
    mask = _mask(op)
    brought = _brought(sharing, [(query, own), (key, keys), (value, keys)])
    own_mask = None if mask is None else _own_mask(sharing, mask, own, keys)
    result = _by_heads(sharing, Ref(name))
    attended = f"{name}.heads"
    sharing.types[attended] = result
    sharing.ops.append(replace(_with(op, tuple(brought), own_mask), outputs=(attended,)))
    attrs = {"axis": SEQUENCE, "count": count, "split": _TOKENS, "join": _HEADS}
    sharing.add(Op(ALL_TO_ALL, (Ref(attended),), (name,), attrs=attrs), [own])


def _brought(sharing: Sharing, values: Sequence[tuple[Ref, Layout]]) -> list[Ref]:
    """Returns values with all tokens of own heads. Those of one type come in one exchange: each has a latency."""
    found: dict[int, Ref] = {}
    alike: dict[TensorType, list[int]] = {}
    given = [sharing.value(ref, layout) for ref, layout in values]
    for index, ref in enumerate(given):
        alike.setdefault(sharing.types[ref.name], []).append(index)
    for type_, positions in alike.items():
        stem, result = values[positions[0]][0].bare, _by_heads(sharing, values[positions[0]][0])
        sent, many = given[positions[0]], len(positions)
        if many > 1:
            together = tuple(given[at] for at in positions)
            sent = sharing.made("aten.cat.default", (together, _BATCH), _times(type_, many), f"%{stem}.together")
        whole = sharing.made(ALL_TO_ALL, (sent,), _times(result, many), f"%{stem}.heads", split=_HEADS, join=_TOKENS)
        for number, at in enumerate(positions):
            batch = result.shape[_BATCH]
            part = sharing.sliced(whole, _times(result, many), _BATCH, number * batch, batch) if many > 1 else whole
            found[at] = part
    return [found[at] for at in range(len(values))]


def _times(type_: TensorType, many: int) -> TensorType:
    """Returns the type of so many values, one after the other along the batch."""
    return replace(type_, shape=(type_.shape[_BATCH] * many, *type_.shape[1:]))


def _by_heads(sharing: Sharing, ref: Ref) -> TensorType:
    """Returns the type of a value with all tokens of own heads."""
    type_ = sharing.program.types[ref.name]
    return local(type_, Layout(_HEADS, (type_.shape[_HEADS],)), sharing.count)


def _own_mask(sharing: Sharing, mask: Ref, own: Layout, keys: Layout) -> Ref:
    """Returns a mask for own heads, with tokens in the order in which they are brought: shard by shard."""
    mask = sharing.value(mask, None)
    type_ = sharing.types[mask.name]
    rank = len(type_.shape)
    for dim, layout in ((rank - 1, keys), (rank - 2, own)):
        if dim >= 0 and type_.shape[dim] == layout.size and layout.size > 1 and len(layout.segments) > 1:
            mask = _by_shards(sharing, mask, type_, layout.at(dim))
    if rank == 4 and type_.shape[_HEADS] > 1:
        parted = local(type_, Layout(_HEADS, (type_.shape[_HEADS],)), sharing.count)
        mask = sharing.made(SHARD, (mask,), parted, f"%{mask.bare}.own", dim=_HEADS)
    return mask


def _by_shards(sharing: Sharing, ref: Ref, type_: TensorType, layout: Layout) -> Ref:
    parts: list[Ref] = []
    for rank in range(sharing.count):
        offset = 0
        for size in layout.segments:
            part = size // sharing.count
            parts.append(sharing.sliced(ref, type_, layout.dim, offset + rank * part, part))
            offset += size
    return sharing.made("aten.cat.default", (tuple(parts), layout.dim), type_, f"%{ref.bare}.by_shards")
