"""How many denoising steps a call takes, from its scheduler's configuration."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

from diffkiln.record.call import Request, defaults

#: Keywords that leave out steps of the schedule.
_PARTIAL = ("strength", "denoising_start", "denoising_end")


def wanted_steps(pipe: Any, request: Request) -> int:
    """Returns how many steps the variant's keywords ask for: the length of its own schedule, or `num_inference_steps`.

    Returns 0 if a keyword such as `strength` leaves some of them out.
    """
    fixed = defaults(pipe, request)
    if any(fixed.get(name) not in (None, 1.0) for name in _PARTIAL):
        return 0
    for name in ("sigmas", "timesteps"):
        given = request.fixed.get(name)
        if isinstance(given, (list, tuple)):
            return len(given)
    return int(fixed.get("num_inference_steps") or 1)


def steps_with(scheduler: Any, wanted: int) -> int:
    """Returns the number of steps that a scheduler makes of `num_inference_steps`.

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
