"""CMMD (Jayasumana et al., 2024): how far two sets of pictures are apart, as CLIP sees them; 0 for equal sets."""

from __future__ import annotations

import torch

from diffkiln.evaluate.metrics._sets import OfSets

#: The bandwidth of the kernel and the scale, from the paper's own implementation.
_SIGMA, _SCALE = 10.0, 1000.0
#: With fewer pictures the number tells of their choice more than of the pipelines.
LEAST = 50


class Cmmd(OfSets):
    packages = ("transformers",)
    least = LEAST

    def distance(self, ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Returns the distance, as the function of this name has it."""
        return distance(ours, theirs)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the squared maximum mean discrepancy with a Gaussian kernel, times 1000.

    Args:
        ours, theirs: vectors of length 1, [pictures, features].
    """

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(torch.cdist(one.double(), other.double()) ** 2) / (2 * _SIGMA**2)).mean()

    return float(_SCALE * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs)))


PLUGIN = Cmmd()
