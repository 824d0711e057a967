"""Distances of two sets of pictures, as CLIP sees them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.evaluate.metrics._clip import embedded


class OfSets(Metric):
    """A distance of the features of our pictures from those of the references.

    Attributes:
        least: how many pictures there must be.
    """

    better = "lower"
    backbone = "clip"
    least: ClassVar[int]

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for few pictures."""
        if about.count < self.least:
            return f"needs at least {self.least:,} pictures; there are {about.count}"
        return super().objection(about)

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the distance of the two sets."""
        folder = about.backbones[self.backbone]
        ours = embedded([pair.picture for pair in pairs], folder)
        theirs = embedded([pair.reference for pair in pairs], folder)
        return Score(self.distance(ours, theirs))

    @abstractmethod
    def distance(self, ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Returns the distance of two sets of features.

        Args:
            ours, theirs: float32 [pictures, features], whose rows have length 1.
        """
