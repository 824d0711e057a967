"""Which weights stay in memory between their uses, so that a call keeps within a limit and reads as little as it can.

A call is a straight line, so every use of every group of weights is known ahead. Between two uses a group may stay,
which costs its bytes in all moments between them, or leave and be brought in again. The shortest stays are granted
first, as long as no moment grows beyond the limit. What is used last in one call and first in the next may stay between
the calls as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from diffkiln.program.moments import Key, Moment
from diffkiln.program.streaming import Ahead, Arena, arranged, brought, coming_through

#: All weights stay; or some, and the others come and go; or each comes and goes; or they come through fixed slots.
Strategy = Literal["resident", "auto", "group", "stream"]


class TooSmall(Exception):
    """A limit of memory within which no plan fits.

    Attributes:
        needed: the smallest limit that some plan keeps, in bytes.
        where: the moment that needs it, as words.
    """

    def __init__(self, limit: int, needed: int, where: str) -> None:
        super().__init__(f"found {limit:,} bytes, required {needed:,}")
        self.needed, self.where = needed, where


@dataclass(frozen=True)
class Residency:
    """The plan of one call's weights.

    Attributes:
        strategy: what the plan amounts to.
        ahead: whether the next group is brought in while the one before it is in use.
        keeps: for each group that comes into use, in order: whether it stays until its next use.
        stays: the groups that stay from the end of a call to the next one.
        memory: bytes of weights, constants and results in each moment.
        brought: bytes of weights that are brought in by each call but the first.
    """

    strategy: Strategy
    ahead: bool
    keeps: tuple[bool, ...] = ()
    stays: frozenset[Key] = frozenset()
    memory: tuple[int, ...] = field(default=(), repr=False)
    brought: int = 0

    @property
    def peak(self) -> int:
        """Returns the most bytes that a call takes."""
        return max(self.memory, default=0)


class _Stay(NamedTuple):
    """A stretch between two uses of a group: the moments in it, and which use it begins with."""

    moments: tuple[range, ...]
    key: Key
    use: int
    wraps: bool

    @property
    def length(self) -> int:
        return sum(map(len, self.moments))


class Residencies:
    """The plans for calls of one bundle.

    Args:
        nbytes: the size of each group.
        fixed: bytes that are in memory throughout: constants, and weights inside engines.
    """

    def __init__(self, nbytes: Mapping[Key, int], fixed: int = 0) -> None:
        self._nbytes, self._fixed = nbytes, fixed

    def resident(self, moments: Sequence[Moment]) -> Residency:
        """Returns the plan in which all weights stay, those of other calls included."""
        uses = sum(moment.enters is not None for moment in moments)
        base = self._fixed + sum(self._nbytes.values())
        memory = tuple(base + moment.results for moment in moments)
        return Residency("resident", False, (True,) * uses, frozenset(self._nbytes), memory)

    def group(self, moments: Sequence[Moment], ahead: bool) -> Residency:
        """Returns the plan in which each group comes for its use and leaves after it, unless it is the next to come."""
        next_again = [] if ahead else [stay for stay in _stays(moments, ahead) if _is_quiet(stay, moments)]
        return self._planned("group", moments, ahead, next_again)

    def within(self, moments: Sequence[Moment], limit: int, ahead: bool = True) -> Residency:
        """Returns the plan that brings in the least within a limit.

        Args:
            moments: of the call.
            limit: in bytes.
            ahead: bring groups in ahead of their use, where the limit leaves room for two at a time.

        Raises:
            TooSmall: no plan keeps within the limit.
        """
        if (found := self.resident(moments)).peak <= limit:
            return found
        for early in (True, False) if ahead else (False,):
            if self._planned("auto", moments, early, ()).peak <= limit:
                return self._planned("auto", moments, early, self._granted(moments, limit, early))
        least = self._planned("auto", moments, False, ())
        moment = moments[least.memory.index(least.peak)]
        raise TooSmall(limit, least.peak, f"while {moment.component or 'the pipeline'} runs ({moment.phase})")

    def arena(self, calls: Sequence[Sequence[Moment]], limit: int | None = None) -> Arena:
        """Returns the slots through which the groups of all calls stream, ahead of their use as the limit has room.

        Args:
            calls: the moments of each.
            limit: the most that a call may take, in bytes; by default as little as there can be.

        Raises:
            TooSmall: no slots keep within the limit.
        """
        largest = max((moment for moments in calls for moment in moments), key=lambda moment: moment.results)
        around = self._fixed + largest.results
        room = None if limit is None else limit - around
        for ahead in get_args(Ahead):
            if (found := arranged(calls, self._nbytes, room, ahead)) is not None:
                return found
        least = arranged(calls, self._nbytes, None, "never")
        assert least is not None
        raise TooSmall(limit or 0, around + least.nbytes, f"for {_described(least)}, in which weights stream")

    def stream(self, moments: Sequence[Moment], arena: Arena) -> Residency:
        """Returns the plan of a call whose weights come through slots, which are in memory throughout."""
        base = self._fixed + arena.nbytes
        memory = tuple(base + moment.results for moment in moments)
        return Residency("stream", arena.ahead != "never", memory=memory, brought=brought(arena, moments))

    def coming(self, moments: Sequence[Moment], plan: Residency, arena: Arena | None = None) -> list[int]:
        """Returns the bytes of weights that come in for each moment of a call that follows the same call."""
        if plan.strategy == "resident":
            return [0] * len(moments)
        if arena is not None:
            return coming_through(arena, moments)
        here: set[Key] = set()
        self._played(moments, plan, here)
        here &= plan.stays
        return self._played(moments, plan, here)

    def _played(self, moments: Sequence[Moment], plan: Residency, here: set[Key]) -> list[int]:
        """Returns what comes in for each moment of a call, in which the groups `here` are in memory."""
        order = [moment.enters for moment in moments if moment.enters is not None]
        found, use, last = [0] * len(moments), -1, dict[Key, int]()
        needs: tuple[Key, ...] = ()
        for index, moment in enumerate(moments):
            following = order[use + 1] if plan.ahead and use + 1 < len(order) else None
            for key in set(needs) - set(moment.needs):
                if not plan.keeps[last[key]] and key != following:
                    here.discard(key)
            needs = moment.needs
            if moment.enters is not None:
                use += 1
                last[moment.enters] = use
                wanted = {moment.enters, *(order[use + 1 : use + 2] if plan.ahead else ())} - here
                found[index] = sum(self._nbytes[key] for key in wanted)
                here |= wanted
        return found

    def _granted(self, moments: Sequence[Moment], limit: int, ahead: bool) -> list[_Stay]:
        """Returns the stays for which there is room, the shortest first."""
        room = [limit - taken for taken in self._taken(moments, ahead)]
        granted: list[_Stay] = []
        for stay in sorted(_stays(moments, ahead), key=lambda stay: (stay.length, stay.use)):
            size = self._nbytes[stay.key]
            if all(room[at] >= size for part in stay.moments for at in part):
                granted.append(stay)
                _take(room, stay, size)
        return granted

    def _planned(
        self, strategy: Strategy, moments: Sequence[Moment], ahead: bool, granted: Sequence[_Stay]
    ) -> Residency:
        memory = self._taken(moments, ahead)
        for stay in granted:
            _take(memory, stay, -self._nbytes[stay.key])
        kept = {stay.use for stay in granted}
        uses = [index for index, moment in enumerate(moments) if moment.enters is not None]
        comes = sum(self._nbytes[stay.key] for stay in _stays(moments, ahead))
        saved = sum(self._nbytes[stay.key] for stay in granted)
        stays = frozenset(stay.key for stay in granted if stay.wraps)
        return Residency(strategy, ahead, tuple(index in kept for index in uses), stays, tuple(memory), comes - saved)

    def _taken(self, moments: Sequence[Moment], ahead: bool) -> list[int]:
        """Returns the bytes of each moment where nothing stays longer than it must."""
        return [
            self._fixed + moment.results + sum(self._nbytes[key] for key in present)
            for moment, present in zip(moments, _present(moments, ahead), strict=True)
        ]


def _described(arena: Arena) -> str:
    """Returns the size of slots as words, with the group that needs the most."""
    if arena.largest is None:
        return "no slots"
    largest = arena.slots[arena.largest].nbytes
    return f"slots of {arena.nbytes:,} bytes (the largest, of {' '.join(arena.largest)}: {largest:,})"


def _take(room: list[int], stay: _Stay, size: int) -> None:
    for part in stay.moments:
        for at in part:
            room[at] -= size


def _is_quiet(stay: _Stay, moments: Sequence[Moment]) -> bool:
    """Returns True if no other group comes into use within a stretch of one call."""
    return not stay.wraps and all(moments[at].enters is None for part in stay.moments for at in part)


def _present(moments: Sequence[Moment], ahead: bool) -> list[set[Key]]:
    """Returns the groups in memory in each moment where nothing stays longer than it must."""
    present: list[set[Key]] = []
    coming: Key | None = None
    for moment in reversed(moments):
        present.append({*moment.needs, coming} if ahead and coming is not None else set(moment.needs))
        coming = moment.enters or coming
    present.reverse()
    first = next((index for index, moment in enumerate(moments) if moment.enters is not None), len(moments))
    for early in present[:first]:
        early.clear()  # nothing is brought in before the first group is used
    return present


def _stays(moments: Sequence[Moment], ahead: bool) -> Iterator[_Stay]:
    """Yields the stretch between each use of a group and its next, or the next call's first.

    There is none between two uses where groups come ahead and no other one comes between: the group stays anyway.
    """
    entering = [index for index, moment in enumerate(moments) if moment.enters is not None]
    uses: dict[Key, list[tuple[int, int]]] = {}  # the first moment of each use, and the first one after it
    for index in entering:
        key = moments[index].enters
        assert key is not None
        uses.setdefault(key, []).append((index, _end_of(moments, key, index)))
    before = dict(zip(entering[1:], entering, strict=False))  # where the group before it came into use
    for key, known in uses.items():
        for (start, end), (again, _) in pairwise(known):
            comes = before[again] if ahead else again
            if before[again] >= end or not ahead:
                yield _Stay((range(end, max(end, comes)),), key, start, False)
        (first, _), (last, end) = known[0], known[-1]
        comes = before.get(first, first) if ahead else first
        yield _Stay((range(end, len(moments)), range(comes)), key, last, True)


def _end_of(moments: Sequence[Moment], key: Key, start: int) -> int:
    """Returns the first moment after `start` that does not need a group, or that brings it into use anew."""
    for index in range(start + 1, len(moments)):
        if key not in moments[index].needs or moments[index].enters == key:
            return index
    return len(moments)
