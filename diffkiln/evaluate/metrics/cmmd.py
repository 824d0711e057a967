"""CMMD (Jayasumana et al., 2024): how far two sets of pictures are apart, as CLIP sees them; 0 for equal sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.evaluate.metrics._clip import embedded

#: The bandwidth of the kernel and the scale, from the paper's own implementation.
_SIGMA, _SCALE = 10.0, 1000.0
#: With fewer pictures the number tells of their choice more than of the pipelines.
LEAST = 50


class Cmmd(Metric):
    better = "lower"
    backbone = "clip"
    packages = ("transformers",)

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for few pictures."""
        if about.count < LEAST:
            return f"needs at least {LEAST} pictures; there are {about.count}"
        return super().objection(about)

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the distance of the two sets."""
        folder = about.backbones[self.backbone]
        ours = embedded([pair.picture for pair in pairs], folder)
        theirs = embedded([pair.reference for pair in pairs], folder)
        return Score(distance(ours, theirs))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the squared maximum mean discrepancy with a Gaussian kernel, times 1000.

    Args:
        ours, theirs: vectors of length 1, [pictures, features].
    """

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(torch.cdist(one.double(), other.double()) ** 2) / (2 * _SIGMA**2)).mean()

    return float(_SCALE * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)))


PLUGIN = Cmmd()
