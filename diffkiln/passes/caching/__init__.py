"""Caching schedules: which steps compute (`steps`), what is kept and reused (`sections`), and the call that does it
(`applying`). They are rewrites of programs and know nothing of models."""

from diffkiln.passes.caching.applying import CallSites, apply_schedule, call_sites_of, with_kept
from diffkiln.passes.caching.choosing import cheapest
from diffkiln.passes.caching.sections import Kept, Split, deep_features, outputs_of, residuals, split
from diffkiln.passes.caching.steps import Mask, evenly, every, magnitude, symbols

__all__ = [
    "CallSites",
    "Kept",
    "Mask",
    "Split",
    "apply_schedule",
    "call_sites_of",
    "cheapest",
    "deep_features",
    "evenly",
    "every",
    "magnitude",
    "outputs_of",
    "residuals",
    "split",
    "symbols",
    "with_kept",
]
