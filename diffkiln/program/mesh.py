"""Several processes as a grid: which of them exchange tensors with which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: The axes of a mesh, the outermost first: neighbours in rank share the sequence.
GUIDANCE, LAYERS, SEQUENCE = "guidance", "layers", "sequence"
AXES = (GUIDANCE, LAYERS, SEQUENCE)

#: Most processes along one axis.
MAX_COUNT = 64


@dataclass(frozen=True)
class Mesh:
    """A grid of processes that run one call together.

    Attributes:
        counts: processes along each axis, by the axes' names; an axis that is not there has one.
    """

    counts: Mapping[str, int]

    @property
    def size(self) -> int:
        """Returns the number of all processes."""
        return math.prod(map(self.count, AXES))

    def count(self, axis: str) -> int:
        """Returns the number of processes along an axis."""
        return self.counts.get(axis, 1)

    def index(self, rank: int, axis: str) -> int:
        """Returns which process along an axis has this rank, from 0."""
        inner = math.prod(map(self.count, AXES[AXES.index(axis) + 1 :]))
        return rank // inner % self.count(axis)

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Returns the ranks of the processes along an axis that a process exchanges with, itself among them."""
        others = [other for other in AXES if other != axis]
        own = [self.index(rank, other) for other in others]
        return tuple(each for each in range(self.size) if [self.index(each, other) for other in others] == own)

    def __str__(self) -> str:
        """Returns the axes that have several processes, such as "guidance 2 x sequence 2"."""
        return " x ".join(f"{axis} {self.count(axis)}" for axis in AXES if self.count(axis) > 1)
