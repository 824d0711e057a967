"""CLIP-FID (Kynkäänniemi et al., 2023): the Fréchet distance of two sets of pictures, as CLIP sees them; 0 for equal
sets. It is FID with CLIP in the place of Inception, whose weights nobody publishes as safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.evaluate.metrics._clip import embedded

#: With fewer pictures than CLIP has features, 512 to 1,024, their covariance is not known.
LEAST = 1_024


class ClipFid(Metric):
    better = "lower"
    backbone = "clip"
    packages = ("transformers", "torchmetrics")

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for few pictures."""
        if about.count < LEAST:
            return f"needs at least {LEAST:,} pictures; there are {about.count}"
        return super().objection(about)

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the distance of the two sets."""
        folder = about.backbones[self.backbone]
        ours = embedded([pair.picture for pair in pairs], folder)
        theirs = embedded([pair.reference for pair in pairs], folder)
        return Score(distance(ours, theirs))


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
