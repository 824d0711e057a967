"""The GPU that a bundle runs on as the process's current one."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from diffkiln.errors import Incompatible
from diffkiln.runtime.accelerator import active, available, count


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one inside the `with` block: engines use its stream and capabilities are asked of it.

    Raises:
        Incompatible: there are fewer GPUs than that.
    """
    if device.type == "cuda" and available() and (device.index or 0) >= (found := count()):
        raise Incompatible(f"gpu: found {found} that torch can use, numbered from 0, required {device}. Choose another")
    return active(device)
