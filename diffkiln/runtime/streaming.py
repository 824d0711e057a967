"""Weights that stream through slots: each group always lies at the same addresses, and nothing is allocated in a call.

What comes in waits, on the device, until what lay in its slot was used for the last time. So the host never waits, and
a copy runs while the groups before it are computed with. See `diffkiln.program.streaming` for the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from diffkiln.errors import InternalFault
from diffkiln.program import Op
from diffkiln.program.moments import Key
from diffkiln.program.streaming import Arena
from diffkiln.runtime.accelerator import Accelerator, Event

Tensors = Sequence[torch.Tensor]
Launch = Callable[[], object]
#: Records what a function launches, which it calls twice: gives what launches it again, and the tensors in which its
#: results then are. Before each of the two calls the other function is called, whose launches are not recorded.
Capture = Callable[[Callable[[], Tensors], Callable[[], None]], tuple[Launch, Tensors]]


class Slots:
    """The slots on a device: their memory, and when each group in them was used for the last time.

    Args:
        arena: where they lie in the memory.
        there: the device; None for the CPU, where slots are plain memory and nobody waits for events.
    """

    def __init__(self, arena: Arena, there: Accelerator | None) -> None:
        self.arena, self._there = arena, there
        self._flat = there.empty(arena.nbytes) if there else torch.empty(arena.nbytes, dtype=torch.uint8)
        self._used: dict[Key, Event] = {}

    def bytes_of(self, key: Key, nbytes: int) -> torch.Tensor:
        """Returns that many bytes of a group's slot."""
        start = self.arena.slots[key].start
        return self._flat[start : start + nbytes]

    def used(self, key: Key) -> None:
        """Notes that all uses of a group that there were have been launched in the current stream."""
        if self._there is not None:
            self._used[key] = self._there.event()
            self._used[key].record(self._there.current_stream())

    def last_uses(self, key: Key) -> list[Event]:
        """Returns, once, the events that a group which comes in has to wait for."""
        found = [self._used.pop(other, None) for other in (key, *self.arena.over[key])]
        return [event for event in found if event is not None]

    def forget_uses(self) -> None:
        """Forgets all uses, as the next copy waits for all that was launched anyway."""
        self._used.clear()


@dataclass
class Moves:
    """The groups that a recorded piece of a call brought in, and those that it found in their slots.

    Attributes:
        brought: in order.
        found: used as they lay there.
    """

    brought: list[Key] = field(default_factory=list)
    found: set[Key] = field(default_factory=set)

    def after(self, arena: Arena) -> tuple[set[Key], set[Key]]:
        """Returns the groups that the piece leaves in their slots, and those that it displaces."""
        left: set[Key] = set()
        displaced: set[Key] = set()
        for key in self.brought:
            left = (left - arena.over[key]) | {key}
            displaced |= arena.over[key]
        return left, displaced - left


class GraphStore(Protocol):
    """The weight store, as far as graphs of weights that stream ask it."""

    def held(self) -> set[Key]: ...

    def settle(self, keys: Iterable[Key]) -> None: ...

    def moving(self) -> AbstractContextManager[Moves]: ...

    def launched(self, moves: Moves) -> None: ...

    def lie(self, keys: Iterable[Key]) -> None: ...

    def alone(self) -> frozenset[Key]: ...


class Recorder:
    """A recorder of pieces of calls as graphs, whose copies of weights are a part of them.

    A graph copies what the piece brought in as it was recorded. So what the piece found in its slots is brought there
    before each launch, unless it is there.

    Args:
        store: the weights.
        cursor: gives that of the call that runs.
        uses: gives how many groups operations of a call use.
    """

    def __init__(
        self, store: GraphStore, cursor: Callable[[], SlotCursor], uses: Callable[[Sequence[Op]], int]
    ) -> None:
        self._store, self._cursor, self.uses = store, cursor, uses

    def __call__(self, position: int, run: Callable[[], Tensors], capture: Capture) -> tuple[Launch, Tensors]:
        """Records a piece of a call that begins with a use of the call's schedule; what it computes is not looked at.

        Returns:
            What launches it, and the tensors in which its results then are.
        """
        start, moves = self._store.held() | self._store.alone(), Moves()

        def ready() -> None:
            self._store.settle(start)
            self._cursor().seek(position)

        def inside() -> Tensors:
            nonlocal moves
            with self._store.moving() as moves:
                return run()

        try:
            launch, results = capture(inside, ready)
        except BaseException:
            self._store.lie(())  # nobody knows how far it got
            raise
        self._store.lie(start)

        def launched() -> None:
            self._store.settle(moves.found)
            launch()
            self._store.launched(moves)

        return launched, results


class Store(Protocol):
    """The weight store, as far as a cursor of weights that stream asks it."""

    def get(self, key: Key) -> Mapping[str, torch.Tensor]: ...

    def prefetch(self, key: Key) -> None: ...

    def held(self) -> set[Key]: ...

    def used(self, key: Key) -> None: ...


class SlotCursor:
    """One run's position in its schedule, whose groups come through slots: `enter` before a use, `leave` after it."""

    def __init__(self, store: Store, schedule: Sequence[Key], arena: Arena) -> None:
        self._store, self._schedule, self._arena = store, schedule, arena
        self._next = 0
        self._held: set[Key] = set()

    def enter(self, key: Key) -> Mapping[str, torch.Tensor]:
        """Returns the tensors of a group by name, on the device, and starts to bring in the next that is missing."""
        if displaced := self._arena.over[key] & self._held:
            raise InternalFault(f"the weights of {key} would displace those of {sorted(displaced)}, which are in use")
        tensors = self._store.get(key)
        self._held.add(key)
        while self._next < len(self._schedule) and self._schedule[self._next] != key:
            self._next += 1
        self._next += 1
        coming = self._arena.coming(self._schedule, self._next, self._held, self._store.held())
        if coming is not None:
            self._store.prefetch(coming)
        return tensors

    def leave(self, key: Key) -> None:
        """Marks a group as not needed now. It stays in its slot until another one needs the room."""
        self._held.discard(key)
        self._store.used(key)

    def seek(self, position: int) -> None:
        """Goes to a use of the schedule."""
        self._next = position

    def close(self) -> None:
        """Marks all groups as not needed; also after an error."""
        for key in list(self._held):
            self.leave(key)
