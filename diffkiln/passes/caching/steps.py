"""Which steps of a denoising run compute, and which reuse."""

from __future__ import annotations

from collections.abc import Sequence

#: A step that computes, and one that reuses, in a line of symbols.
COMPUTES, REUSES = "●", "○"

#: An error that reaches the threshold is within it, whatever the last bit of a sum says.
_ROUNDING = 1 + 1e-6

Mask = tuple[bool, ...]


def every(count: int, interval: int, start: int = 1, end: int = 0) -> Mask:
    """Returns a mask in which the first `start` and the last `end` steps compute, and between them every `interval`-th.

    Source: Selvaraju and others, "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration", 2024,
    https://arxiv.org/abs/2407.01425.
    """
    return tuple(step < start or step >= count - end or (step - start + 1) % interval == 0 for step in range(count))


def evenly(count: int, computed: int) -> Mask:
    """Returns a mask in which the first step computes, and others at distances as even as possible."""
    chosen = {step * count // computed for step in range(computed)}
    return tuple(step in chosen for step in range(count))


def magnitude(ratios: Sequence[float], threshold: float, most: int, retention: float) -> Mask:
    """Returns a mask in which steps reuse while the predicted error stays within the threshold, `most` in a row.

    Args:
        ratios: for each step, the size of its residual against that of the step before; the first is not read.
        threshold: of the error that adds up from step to step.
        most: steps that may reuse one after the other.
        retention: the share of the steps, from the first, that always compute.

    Source: Ma and others, "MagCache: Fast Video Generation with Magnitude-Aware Cache", 2025,
    https://arxiv.org/abs/2506.09045.
    """
    first = max(1, int(retention * len(ratios) + 0.5))
    mask: list[bool] = []
    product, error, reused = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step >= first:
            product *= ratio
            reused += 1
            error += abs(1.0 - product)
        computes = step < first or error > threshold * _ROUNDING or reused > most
        if computes:
            product, error, reused = 1.0, 0.0, 0
        mask.append(computes)
    return tuple(mask)


def symbols(mask: Sequence[bool]) -> str:
    """Returns one symbol a step."""
    return "".join(COMPUTES if computes else REUSES for computes in mask)
