"""Steps that are listed one by one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkiln.passes.program.cache_schedule.base import METHOD
from diffkiln.passes.program.cache_schedule.fixed import STEPS, Listed, Steps


class StepMask(Listed):
    """A schedule in which the listed `steps` compute; the others reuse the denoiser's last output."""

    method: Literal["mask"] = Field(description=METHOD)
    steps: Steps = Field(description=STEPS)
    keep: Literal["output", "blocks"] = Field(
        "output", description="Keep the denoiser's output, and call nothing; or the sum that its blocks add."
    )

    @property
    def listed(self) -> tuple[int, ...] | str:
        return self.steps

    @property
    def around(self) -> tuple[int, int] | None:
        return (0, 0) if self.keep == "blocks" else None
