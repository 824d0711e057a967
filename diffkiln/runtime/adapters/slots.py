"""Adapters in the slots of layers: their factors are copied beside the weights, and each row of a batch has a scale.

A slot keeps its adapter until another one needs the room, so what is used again costs a few numbers for each row. Which
slot an adapter has in a call follows from the names of the call's adapters alone: in another slot a sum has other bits.
Where the bundle has programs for fewer adapters, a call's are in the first slots, which are those that are computed.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from diffkiln.errors import CallError
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP
from diffkiln.runtime.adapters.adding import Change
from diffkiln.runtime.adapters.reading import Adapter
from diffkiln.runtime.adapters.scales import Scale, scale_of
from diffkiln.runtime.adapters.targets import Layers, Room, Target
from diffkiln.runtime.weights import Key, Patch, WeightStore

#: Name of an adapter → its scale.
Mix = Mapping[str, Scale]

#: A tensor of factors begins at a multiple of so many numbers, as engines take them.
_ALIGNED = 64


@dataclass(frozen=True)
class _Columns:
    """The factors of a layer among those of all: where they begin, and which row of the table its first part is."""

    room: Room
    begin: int
    part: int


class Slots:
    """The slots of one pipeline's layers, and which adapter is in each.

    Args:
        store: Whose weights the slots are among.
        layers: Those of each component that has slots.
    """

    def __init__(self, store: WeightStore, layers: Sequence[Layers]) -> None:
        self._store = store
        rooms = {
            (each.component, target.layer): target.room
            for each in layers
            for target in each.targets.values()
            if target.room is not None and target.used
        }
        self.count = min((room.slots for room in rooms.values()), default=0)
        self._most_rows = min((room.rows for room in rooms.values()), default=0)
        self._rows = max((room.rows for room in rooms.values()), default=0)
        self._width = max((room.slots for room in rooms.values()), default=0)
        self._held: dict[int, str] = {}  # slot → the adapter that is in it
        self._inside: dict[int, frozenset[tuple[str, str]]] = {}
        self._current: Hashable = None
        self._columns: dict[tuple[str, str], _Columns] = {}
        self._tables: list[_Table] = []
        self._parts = 0
        by_dtype: dict[str, list[tuple[str, str]]] = {}
        for owner in rooms:
            by_dtype.setdefault(self._dtype(owner), []).append(owner)
        for dtype, owners in by_dtype.items():
            self._tables.append(self._table(dtype, {owner: rooms[owner] for owner in owners}))

    def _dtype(self, owner: tuple[str, str]) -> str:
        found = self._store.type_of(owner[0], f"{owner[1]}.{FACTORS}")
        return found.dtype if found is not None else "float32"

    def _table(self, dtype: str, rooms: Mapping[tuple[str, str], Room]) -> _Table:
        """Puts one tensor into the place of the factors of all layers of one type."""
        begin, indices = 0, []
        for owner, room in rooms.items():
            self._columns[owner] = _Columns(room, begin, self._parts)
            indices.append(_padded(self._indices(room, self._parts)))
            begin += len(indices[-1])
            self._parts += room.parts
        flat = torch.zeros(begin, dtype=dtype_of(dtype), device=self._store.device)
        for (component, layer), room in rooms.items():
            start, columns = self._columns[component, layer].begin, room.parts * room.slots * room.rank
            own = flat[start : start + room.rows * columns].view(room.rows, columns)
            name = f"{layer}.{FACTORS}"
            self._store.put(self._store.key_of(component, name), {name: own})
        return _Table(flat, torch.cat(indices))

    def _indices(self, room: Room, part: int) -> torch.Tensor:
        """Returns, for each of a layer's factors [rows, parts, slots, rank], its place among those of all."""
        parts = torch.arange(part, part + room.parts).view(1, -1, 1, 1)
        rows = torch.arange(room.rows).view(-1, 1, 1, 1)
        slots = torch.arange(room.slots).view(1, 1, -1, 1)
        found = (parts * self._rows + rows) * self._width + slots
        return found.expand(room.rows, room.parts, room.slots, room.rank).reshape(-1)

    # -- what a call uses --

    def use(self, rows: Sequence[Mix], loaded: Mapping[str, Adapter], counts: Sequence[int] = ()) -> int:
        """Puts the adapters of a call into slots, and says how much each row uses of each.

        Args:
            rows: The mix of each row of the batch, in order; they are repeated for copies of the batch.
            loaded: All adapters, by name.
            counts: Numbers of slots, less than all, which the call may compute alone.

        Returns:
            How many slots the call computes: the first so many.

        Raises:
            CallError: The call uses more adapters than there are slots.
        """
        names = sorted({name for mix in rows for name in mix if mix[name]})
        self.check(names)
        mixes = tuple(tuple((name, mix[name]) for name in names if mix.get(name)) for mix in rows)
        count = count_for(len(names), counts, self.count)
        if (mixes, count) == self._current:
            return count
        self._current = None
        slots = slots_of(names, count)
        for name, slot in slots.items():
            if self._held.get(slot) != name:
                self._fill(slot, name, loaded[name].changes)
        self._tell(mixes, slots, loaded)
        self._current = mixes, count
        return count

    def check(self, names: Sequence[str]) -> None:
        """Raises `CallError` if a call uses more adapters than there are slots."""
        if len(names) > self.count:
            raise CallError(
                f"adapters: {len(names)} of them in one call, and the bundle has {self.count} slots. Use fewer, or "
                'compile it with more: "runtime": {"adapters": {"slots": …}}'
            )

    def forget(self, name: str) -> None:
        """Empties the slots that an adapter is in."""
        self._current = None
        for slot in [slot for slot, other in self._held.items() if other == name]:
            self._fill(slot, "", ())

    def _fill(self, slot: int, name: str, changes: Sequence[Change]) -> None:
        self._held.pop(slot, None)
        self._put(slot, changes)
        self._held[slot] = name

    def _put(self, slot: int, changes: Sequence[Change]) -> None:
        """Writes an adapter's factors into a slot, and zeros over what is left there of the one before."""
        by_layer: dict[tuple[str, str], list[Change]] = {}
        for change in (change for change in changes if change.target.used):
            by_layer.setdefault((change.target.component, change.target.layer), []).append(change)
        before = self._inside.get(slot, frozenset())
        self._inside[slot] = before | by_layer.keys()
        fills: dict[tuple[Key, Hashable], Patch] = {}
        for component, layer in sorted(self._inside[slot]):
            names = (f"{layer}.{DOWN}", f"{layer}.{UP}")
            for name in names:  # which may lie in groups of their own
                key = self._store.key_of(component, name)
                fills[key, (name, slot)] = _patch(name, slot, by_layer.get((component, layer), []))
        self._store.fill(fills)
        self._inside[slot] = frozenset(by_layer)

    def _tell(
        self, rows: Sequence[Sequence[tuple[str, Scale]]], slots: Mapping[str, int], loaded: Mapping[str, Adapter]
    ) -> None:
        table = torch.zeros(self._parts, self._rows, self._width)
        columns: dict[tuple[str, Scale], torch.Tensor] = {}
        for index in range(self._rows):
            for name, scale in rows[index % len(rows)]:
                if (name, scale) not in columns:
                    columns[name, scale] = self._column(loaded[name], scale)
                table[:, index, slots[name]] = columns[name, scale]
        for each in self._tables:
            each.write(table)

    def _column(self, adapter: Adapter, scale: Scale) -> torch.Tensor:
        """Returns the number by which each part of each layer multiplies an adapter."""
        column = torch.zeros(self._parts)
        at, values = [], []
        for change in (change for change in adapter.changes if change.target.used):
            target = change.target
            at.append(self._columns[target.component, target.layer].part + part_of(target))
            values.append(scale_of(scale, target.path) * change.factor)
        column[torch.tensor(at, dtype=torch.long)] = torch.tensor(values)
        return column

    def expanded(self, mixes: Sequence[Mix], images: int) -> list[Mix]:
        """Returns the mix of each row of a batch, which has so many images for each prompt."""
        rows = [mix for mix in mixes for _ in range(images)]
        if len(rows) > self._most_rows:
            raise CallError(
                f"adapters: {len(rows)} rows, and the bundle's slots tell {self._most_rows} apart. Give one mix"
            )
        return rows


@dataclass(frozen=True)
class _Table:
    """The factors of many layers in one tensor, and the place of each among the numbers of all layers."""

    flat: torch.Tensor
    indices: torch.Tensor

    def write(self, table: torch.Tensor) -> None:
        self.flat.copy_(table.reshape(-1)[self.indices].to(self.flat.dtype))


def count_for(used: int, counts: Sequence[int], most: int) -> int:
    """Returns how many slots a call computes that uses so many adapters, where every layer has `most` or more."""
    return min((count for count in counts if used <= count < most), default=most)


def slots_of(names: Sequence[str], count: int) -> dict[str, int]:
    """Returns the slots of a call's adapters: each has one of its own by its name, or the next that is free."""
    found: dict[str, int] = {}
    for name in sorted(names):
        first = zlib.crc32(name.encode()) % count
        free = ((first + step) % count for step in range(count))
        found[name] = next(slot for slot in free if slot not in found.values())
    return found


def part_of(target: Target) -> int:
    """Returns which part of its layer's slots a layer has."""
    return target.part[0] if target.part is not None else 0


def _padded(indices: torch.Tensor) -> torch.Tensor:
    missing = -len(indices) % _ALIGNED
    return torch.cat((indices, indices.new_zeros(missing))) if missing else indices


def _patch(name: str, slot: int, changes: Sequence[Change]) -> Patch:
    """Returns what writes the factors of one slot into one of a layer's two tensors."""

    def apply(tensors: Mapping[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        for part, factor in _factors(name, tensor, slot, changes):
            rank = factor.shape[0] if name.endswith(DOWN) else factor.shape[1]
            if name.endswith(DOWN):
                part[:rank].copy_(factor)
                part[rank:].zero_()
            else:
                part[:, :rank].copy_(factor)
                part[:, rank:].zero_()

    return Patch((name,), apply)


def _factors(
    name: str, tensor: torch.Tensor, slot: int, changes: Sequence[Change]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the places of a slot that are written, and what is written there."""
    if not name.endswith(DOWN):
        if sum(change.rows.stop - change.rows.start for change in changes) < tensor.shape[0]:
            tensor[:, slot].zero_()
        yield from ((tensor[change.rows, slot], change.up) for change in changes)
        return
    if len(changes) < tensor.shape[0]:
        tensor[:, slot].zero_()
    yield from ((tensor[part_of(change.target), slot], change.down) for change in changes)
