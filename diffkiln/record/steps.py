"""How many denoising steps a call takes, from its scheduler's configuration."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

from diffkiln.record.pipeline import Request, defaults


def wanted_steps(pipe: Any, request: Request) -> int:
    """The variant's `num_inference_steps`, or the pipeline's own."""
    return int(defaults(pipe, request).get("num_inference_steps") or 1)


def steps_with(scheduler: Any, wanted: int) -> int:
    """The number of steps that a scheduler makes of `num_inference_steps`.

    Most make as many; some, such as PNDM and Heun, take more.
    """
    scheduler = copy.deepcopy(scheduler)
    set_timesteps = getattr(scheduler, "set_timesteps", None)
    if set_timesteps is None:
        return wanted
    more = {"mu": 1.0} if "mu" in inspect.signature(set_timesteps).parameters else {}
    with contextlib.suppress(Exception):  # some take arguments that only the pipeline knows
        set_timesteps(wanted, **more)
        return len(scheduler.timesteps)  # type: ignore[union-attr]
    return wanted
