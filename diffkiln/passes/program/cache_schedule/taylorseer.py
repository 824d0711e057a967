"""What was kept is extrapolated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.program.cache_schedule.base import METHOD, hooks
from diffkiln.passes.program.cache_schedule.fixed import ByInterval

#: What is kept, how many steps at the beginning compute, and at the end: what diffusers' TaylorSeer can do as well.
_PLAIN = ("output", 1, 0)


class TaylorSeer(ByInterval):
    """A schedule that extrapolates the kept values by a polynomial of `order`."""

    method: Literal["taylorseer"] = Field(description=METHOD)
    keep: Literal["output", "blocks"] = Field(
        "output", description="Extrapolate the denoiser's output, or the sum that its blocks add."
    )
    order: Literal[0, 1, 2] = Field(1, description="Order of the polynomial.")

    @property
    def around(self) -> tuple[int, int] | None:
        return (0, 0) if self.keep == "blocks" else None

    @property
    def extrapolation(self) -> int:
        return self.order

    def check_measured(self, where: str) -> Iterable[Problem]:
        if self.order:
            reason = "costs are measured for reuse of the last value, not for an extrapolation"
            yield Problem(f"{where}.order", reason, "Set it to 0, or name the steps.")

    def hook(self, pipe: Any) -> Any:
        if self.interval is None or (self.keep, self.start, self.end) != _PLAIN:
            return None
        return hooks().TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=-1,  # so that step 0 is one of the interval's
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
