"""Peak signal-to-noise ratio: how small the squared error is, in decibels."""

from __future__ import annotations

from diffkiln.compiler.metrics import About, Pair, PairMetric

#: Stands for equal pictures, of which the ratio is infinite.
EQUAL = 120.0


class Psnr(PairMetric):
    unit = "dB"

    def value(self, pair: Pair, about: About) -> float:
        """Returns the ratio in dB, at most 120."""
        from torchmetrics.functional.image import peak_signal_noise_ratio

        each = peak_signal_noise_ratio(
            pair.picture, pair.reference, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )  # of each frame
        return float(each.clamp_max(EQUAL).mean())


PLUGIN = Psnr()
