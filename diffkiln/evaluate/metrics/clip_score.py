"""CLIPScore (Hessel et al., 2021): how well a picture fits its prompt, 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.evaluate.metrics._clip import embedded, embedded_texts


class ClipScore(Metric):
    """CLIPScore as torchmetrics defines it: 100 times the cosine, at least 0.

    The function of torchmetrics 1.9 fails with transformers 5.
    """

    backbone = "clip"
    packages = ("transformers",)

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the score of each picture with its prompt, and the mean of the references."""
        folder = about.backbones[self.backbone]
        texts = embedded_texts([pair.prompt for pair in pairs], folder)
        ours = _fit(embedded([pair.picture for pair in pairs], folder), texts)
        theirs = _fit(embedded([pair.reference for pair in pairs], folder), texts)
        return Score(sum(ours) / len(ours), tuple(ours), sum(theirs) / len(theirs))


def _fit(pictures: torch.Tensor, texts: torch.Tensor) -> list[float]:
    return (100 * (pictures * texts).sum(-1)).clamp_min(0).tolist()


PLUGIN = ClipScore()
