"""ACE-Step: sound whose greatest number is above 1 is divided by it, which is decided by reading the numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import torch

from diffkiln.families import Family
from diffkiln.record.patches import Patch


class _Torch:
    """The library as the pipeline's module sees it while its call is recorded.

    Its one question, whether any peak is above 1, is always answered with yes: the peaks that the sound is then divided
    by are at least 1, and a division by 1 changes nothing.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def any(self, _peaks: torch.Tensor) -> bool:
        """Returns True."""
        return True


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the call, which divides all sound by its peak where that is above 1."""

    @wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(sys.modules[original.__module__], "torch", _Torch()):
            return original(self, *args, **kwargs)

    return __call__


PLUGIN = Family(
    patches=(Patch({"__call__": "db0a0c2e1e6d2247"}, _call, known_in="AceStepPipeline", around=True),),
)
