"""How much more, or other, a video flickers than its reference: 0 for the same changes from frame to frame."""

from __future__ import annotations

from diffkiln.compiler.metrics import About, Pair, PairMetric


class Flicker(PairMetric):
    better = "lower"
    packages = ()

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: pictures do not flicker."""
        return "is of videos" if about.frames < 2 else super().objection(about)

    def value(self, pair: Pair, about: About) -> float:
        """Returns the mean absolute difference of what changes from each frame to the next, 0 to 2."""
        return float((pair.picture.diff(dim=0) - pair.reference.diff(dim=0)).abs().mean())


PLUGIN = Flicker()
