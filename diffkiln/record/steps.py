"""How many denoising steps a call takes, from its scheduler's configuration."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

from diffkiln.record.pipeline import Request, defaults


def steps_of(pipe: Any, request: Request) -> int:
    """The number of steps that the pipeline's scheduler makes of `num_inference_steps`.

    Most schedulers make as many; some, such as PNDM and Heun, take more.
    """
    wanted = int(defaults(pipe, request).get("num_inference_steps") or 1)
    scheduler = copy.deepcopy(getattr(pipe, "scheduler", None))
    set_timesteps = getattr(scheduler, "set_timesteps", None)
    if set_timesteps is None:
        return wanted
    more = {"mu": 1.0} if "mu" in inspect.signature(set_timesteps).parameters else {}
    with contextlib.suppress(Exception):  # some take arguments that only the pipeline knows
        set_timesteps(wanted, **more)
        return len(scheduler.timesteps)  # type: ignore[union-attr]
    return wanted
