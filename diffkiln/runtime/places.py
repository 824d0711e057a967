"""The GPU that a bundle runs on as the process's current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from diffkiln.errors import Incompatible


def current(place: torch.device) -> AbstractContextManager[object]:
    """While it lasts, a GPU is the current one: engines take its current stream, and capabilities are asked of it.

    Raises:
        Incompatible: there are fewer GPUs than that.
    """
    if place.type != "cuda" or not torch.cuda.is_available():
        return nullcontext()
    count = torch.cuda.device_count()
    if (place.index or 0) >= count:
        raise Incompatible(f"gpu: found {count} that torch can use, numbered from 0, required {place}. Choose another")
    return torch.cuda.device(place)
