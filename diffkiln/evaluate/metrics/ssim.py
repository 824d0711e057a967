"""Structural similarity (Wang et al., 2004): 1 for equal pictures."""

from __future__ import annotations

from diffkiln.compiler.metrics import About, Pair, PairMetric

#: torchmetrics' window, in pixels.
WINDOW = 11


class Ssim(PairMetric):
    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for pictures that are smaller than the window."""
        small = min(about.height, about.width) < WINDOW
        return f"needs pictures of at least {WINDOW} pixels a side" if small else super().objection(about)

    def value(self, pair: Pair, about: About) -> float:
        """Returns the mean over the frames."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        found = structural_similarity_index_measure(pair.picture, pair.reference, data_range=1.0)
        return float(found[0] if isinstance(found, tuple) else found)


PLUGIN = Ssim()
