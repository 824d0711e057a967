"""How a value lies on the processes of an axis: whole on each, or one shard on each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffkiln.program import TensorType


@dataclass(frozen=True, slots=True)
class Layout:
    """A dimension of which every process has a shard.

    The dimension is made of segments, one after the other, such as the tokens of a text and those of an image. Each is
    parted evenly, and a shard has its part of every segment.
    """

    dim: int
    segments: tuple[int, ...]

    @property
    def size(self) -> int:
        """Returns the size of the dimension on all processes together."""
        return sum(self.segments)

    def at(self, dim: int) -> Layout:
        """Returns the layout with the shards along another dimension."""
        return replace(self, dim=dim)

    def within(self, start: int, end: int) -> Layout | None:
        """Returns the layout of a slice of the dimension; None if it does not begin and end where segments do."""
        kept: list[int] = []
        offset = 0
        for size in self.segments:
            if offset >= start and offset + size <= end:
                kept.append(size)
            offset += size
        return (
            replace(self, segments=tuple(kept)) if kept and sum(kept) == end - start and self._begins(start) else None
        )

    def _begins(self, start: int) -> bool:
        return start in [sum(self.segments[:index]) for index in range(len(self.segments))]


def local(type_: TensorType, layout: Layout | None, count: int) -> TensorType:
    """Returns the type of one process's shard of a value."""
    if layout is None:
        return type_
    shape = list(type_.shape)
    shape[layout.dim] //= count
    return replace(type_, shape=tuple(shape))
