"""CLIP-FID (Kynkäänniemi et al., 2023): the Fréchet distance of two sets of pictures, as CLIP sees them; 0 for equal
sets. It is FID with CLIP in the place of Inception, whose weights nobody publishes as safetensors.
"""

from __future__ import annotations

import torch

from diffkiln.evaluate.metrics._sets import OfSets

#: With fewer pictures than CLIP has features, 512 to 1,024, their covariance is not known.
LEAST = 1_024


class ClipFid(OfSets):
    packages = ("transformers", "torchmetrics")
    least = LEAST

    def distance(self, ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Returns the distance, as the function of this name has it."""
        return distance(ours, theirs)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the Fréchet distance of two Gaussians that have the means and covariances of features.

    Args:
        ours, theirs: [pictures, features].
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(ours.shape[1]))
    metric.update(theirs, real=True)
    metric.update(ours, real=False)
    return float(metric.compute())


class _AsTheyAre(torch.nn.Module):
    """The features in the place of the network that would make them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns what it is given."""
        return features


PLUGIN = ClipFid()
