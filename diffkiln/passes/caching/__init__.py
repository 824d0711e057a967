"""Caching schedules: which steps compute (`steps`), what is kept and reused (`sections`), and the call that does it
(`weaving`). They are rewrites of programs and know nothing of models."""

from diffkiln.passes.caching.choosing import cheapest
from diffkiln.passes.caching.sections import Kept, Split, deep_features, outputs_of, residuals, split
from diffkiln.passes.caching.steps import Mask, evenly, every, magnitude, symbols
from diffkiln.passes.caching.weaving import Lanes, lanes_of, weave, with_kept

__all__ = [
    "Kept",
    "Lanes",
    "Mask",
    "Split",
    "cheapest",
    "deep_features",
    "evenly",
    "every",
    "lanes_of",
    "magnitude",
    "outputs_of",
    "residuals",
    "split",
    "symbols",
    "weave",
    "with_kept",
]
