"""Vector clocks: which operation of a device happens before which, whatever the device's pace."""

from __future__ import annotations

from dataclasses import dataclass, field


class Clock(dict[str, int]):
    """For each queue, how many of its operations are known to be done."""

    def join(self, other: Clock) -> None:
        for queue, count in other.items():
            self[queue] = max(self.get(queue, 0), count)

    def before(self, other: Clock) -> bool:
        """Returns True if all that this clock knows is known to the other."""
        return all(other.get(queue, 0) >= count for queue, count in self.items())

    def copy(self) -> Clock:
        return Clock(self)


@dataclass(frozen=True)
class Race:
    """Two operations on the same bytes, one of which writes, that nothing orders."""

    first: str
    second: str


@dataclass(frozen=True)
class _Access:
    start: int
    end: int
    writes: bool
    at: Clock
    what: str


@dataclass
class Accesses:
    """All accesses of memory so far, and the races among them."""

    races: list[Race] = field(default_factory=list)
    _of_block: dict[int, list[_Access]] = field(default_factory=dict)

    def add(self, block: int, span: tuple[int, int], writes: bool, at: Clock, what: str) -> None:
        """Notes an access of bytes [start, end) of a block of memory, and its races with earlier ones."""
        new = _Access(*span, writes, at, what)
        earlier = self._of_block.setdefault(block, [])
        for old in earlier:
            overlaps = old.start < new.end and new.start < old.end
            if overlaps and (old.writes or new.writes) and not old.at.before(at):
                self.races.append(Race(old.what, what))
        earlier.append(new)
