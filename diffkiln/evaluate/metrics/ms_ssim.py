"""Structural similarity at several scales (Wang et al., 2003): 1 for equal pictures."""

from __future__ import annotations

from diffkiln.compiler.metrics import About, Pair, PairMetric

#: Five scales with windows of 11 pixels: torchmetrics wants a sixteenth of a side to hold the window.
_SMALLEST = 11 * 2**4


class MsSsim(PairMetric):
    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for pictures that are too small for five scales."""
        small = min(about.height, about.width) < _SMALLEST
        return f"needs pictures of at least {_SMALLEST} pixels a side" if small else super().objection(about)

    def value(self, pair: Pair, about: About) -> float:
        """Returns the mean over the frames."""
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

        return float(multiscale_structural_similarity_index_measure(pair.picture, pair.reference, data_range=1.0))


PLUGIN = MsSsim()
