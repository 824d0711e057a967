"""Slots of weights that stream: where each group lies on the device, in one piece of memory that is never given back.

A group has one slot and lies nowhere else, so the addresses of its weights never change. Groups that are in use
together, and the next one to come, have slots apart. Other slots may share bytes: what comes in takes the room of what
lay there. All calls of a bundle share the slots.

    rest │ block 0, 2, 4 … │ block 1, 3, 5 …        two slots are enough for an even number of blocks, three for an odd
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from types import MappingProxyType
from typing import Literal, NamedTuple

from diffkiln.program.moments import Key, Moment

#: Bytes that a slot begins at a multiple of.
ALIGNMENT = 256
#: When groups come in ahead: also across the borders of components, within one component, or never.
Ahead = Literal["always", "within", "never"]


class Slot(NamedTuple):
    """The bytes [start, start + nbytes) of the memory that slots lie in."""

    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def overlaps(self, other: Slot) -> bool:
        """Returns True if the two have bytes in common."""
        return self.start < other.end and other.start < self.end


class Arena:
    """The slots of a bundle's groups in one piece of memory.

    Attributes:
        slots: by group.
        over: for each group, the others whose slots have bytes in common with its own.
        ahead: when the next group comes in while the one before it is in use.
    """

    def __init__(self, slots: Mapping[Key, Slot], ahead: Ahead = "always") -> None:
        self.slots, self.ahead = slots, ahead
        self.over = {
            key: frozenset(other for other, its in slots.items() if other != key and slot.overlaps(its))
            for key, slot in slots.items()
        }

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the memory."""
        return max((slot.end for slot in self.slots.values()), default=0)

    @cached_property
    def largest(self) -> Key | None:
        """Returns the group with the largest slot."""
        return max(self.slots, key=lambda key: self.slots[key].nbytes, default=None)

    def coming(self, schedule: Sequence[Key], at: int, held: Collection[Key], here: Collection[Key]) -> Key | None:
        """Returns the group to bring in ahead; None if nothing is missing, or its slot is still needed.

        Args:
            schedule: the groups in the order of their use.
            at: the next use.
            held: groups in use.
            here: groups in their slots.
        """
        needed = set(held)
        for key in () if self.ahead == "never" else islice(schedule, at, at + 2 * len(self.slots)):
            if key not in here:
                return None if self.over[key] & needed else key
            needed.add(key)
        return None


def arranged(
    calls: Sequence[Sequence[Moment]], sizes: Mapping[Key, int], room: int | None = None, ahead: Ahead = "always"
) -> Arena | None:
    """Returns slots for all groups that calls use.

    Args:
        calls: the moments of each.
        sizes: the bytes of each group.
        room: the most bytes of the slots together; by default as few as there can be.
        ahead: where to leave room for the next group to come in while the one before it is in use.

    Returns:
        The slots among which a call brings in the least; None if there is too little room.
    """
    schedules = dict.fromkeys(tuple(_entering(listed)) for listed in calls)
    keys = dict.fromkeys(key for schedule in schedules for key in schedule)
    slots = {key: -(-sizes[key] // ALIGNMENT) * ALIGNMENT for key in keys}
    apart = _apart(calls, ahead)
    # The largest first; or those first that leave the least room for others.
    orders = [
        sorted(keys, key=lambda key: -slots[key]),
        sorted(keys, key=lambda key: -slots[key] - sum(slots[other] for other in apart[key])),
    ]
    least = min((_arena(order, slots, apart, ahead) for order in orders), key=lambda arena: arena.nbytes)
    room = least.nbytes if room is None else room
    costs = Counter[tuple[Key, Key]]()
    for schedule in schedules:
        costs.update(_displaced(schedule, slots))

    wide = (_fitted(order, slots, apart, room, costs) for order in orders)
    found = [least] if least.nbytes <= room else []
    found += [Arena(fitted, ahead) for fitted in wide if fitted]
    return min(found, key=partial(_expense, calls=calls), default=None)


def _expense(arena: Arena, calls: Sequence[Sequence[Moment]]) -> tuple[int, int]:
    """Returns what calls bring in through slots, and the bytes of these."""
    return sum(brought(arena, listed) for listed in calls), arena.nbytes


def _arena(order: Sequence[Key], sizes: Mapping[Key, int], apart: Mapping[Key, set[Key]], ahead: Ahead) -> Arena:
    """Returns slots that each lie as near to the beginning as they can."""
    fitted = _fitted(order, sizes, apart)
    assert fitted is not None, "there is a slot wherever there is room without end"
    return Arena(fitted, ahead)


def brought(arena: Arena, moments: Sequence[Moment]) -> int:
    """Returns the bytes that a call brings in that follows the same call, as the runtime does it."""
    return sum(coming_through(arena, moments))


def coming_through(arena: Arena, moments: Sequence[Moment]) -> list[int]:
    """Returns the bytes that come in for each moment of a call that follows the same call."""
    schedule = list(_entering(moments))
    here: set[Key] = set()
    found = [0] * len(moments)

    def bring(key: Key) -> int:
        here.difference_update(arena.over[key])
        here.add(key)
        return arena.slots[key].nbytes

    for _ in range(2):
        at = 0
        for index, moment in enumerate(moments):
            if moment.enters is None:
                continue
            at += 1
            found[index] = bring(moment.enters) if moment.enters not in here else 0
            if (key := arena.coming(schedule, at, moment.needs, here)) is not None:
                found[index] += bring(key)
    return found


def _entering(moments: Sequence[Moment]) -> Iterator[Key]:
    return (moment.enters for moment in moments if moment.enters is not None)


def _apart(calls: Sequence[Sequence[Moment]], ahead: Ahead) -> dict[Key, set[Key]]:
    """Returns, for each group, the others that are in use with it, or next while it is in use."""
    apart: dict[Key, set[Key]] = {}
    for present in {present for moments in calls for present in _present(moments, ahead)}:
        for key in present:
            apart.setdefault(key, set()).update(present - {key})
    return apart


def _present(moments: Sequence[Moment], ahead: Ahead) -> Iterator[frozenset[Key]]:
    """Yields the groups that are needed in each moment in which one comes into use, with the next of the others."""
    coming: list[Key] = []  # the next groups to come into use, the nearest last, each once
    for moment in reversed(moments):
        if moment.enters is None:
            continue
        following = next((key for key in reversed(coming) if key not in moment.needs), None)
        present = set(moment.needs)
        if following is not None and (ahead == "always" or (ahead == "within" and following[0] == moment.component)):
            present.add(following)
        yield frozenset(present)
        coming = [key for key in coming if key != moment.enters] + [moment.enters]


def _displaced(schedule: Sequence[Key], sizes: Mapping[Key, int]) -> Counter[tuple[Key, Key]]:
    """Returns, for two groups (a, b), the bytes of a that each call brings in again if b lies over it."""
    found = Counter[tuple[Key, Key]]()
    recent: list[Key] = []  # each group once, the last one used last
    for key in (*schedule, *schedule):  # the second time as after a call before it
        if key in recent:
            at = recent.index(key)
            for other in recent[at + 1 :]:
                found[key, other] += sizes[key]
            del recent[at]
        recent.append(key)
    return found


def _fitted(
    order: Sequence[Key],
    sizes: Mapping[Key, int],
    apart: Mapping[Key, set[Key]],
    room: int | None = None,
    costs: Mapping[tuple[Key, Key], int] = MappingProxyType({}),
) -> dict[Key, Slot] | None:
    """Returns a slot for each group in turn, where it costs the least; None if there is no room for one."""
    slots: dict[Key, Slot] = {}
    again = dict.fromkeys(order, 0)  # the bytes of a group that come in again because of others over its slot
    for key in order:
        best: tuple[int, Slot, list[Key]] | None = None
        for start in sorted({0, *(slot.end for slot in slots.values())}):
            slot = Slot(start, sizes[key])
            if room is not None and slot.end > room:
                break
            under = [other for other, its in slots.items() if slot.overlaps(its)]
            if not apart[key].isdisjoint(under):
                continue
            own = max((costs.get((key, other), 0) for other in under), default=0)
            cost = own + sum(max(0, costs.get((other, key), 0) - again[other]) for other in under)
            if best is None or cost < best[0]:
                best = cost, slot, under
            if cost == 0:
                break
        if best is None:
            return None
        _, slots[key], under = best
        for other in under:
            again[key] = max(again[key], costs.get((key, other), 0))
            again[other] = max(again[other], costs.get((other, key), 0))
    return slots
