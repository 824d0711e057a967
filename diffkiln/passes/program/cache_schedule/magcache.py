"""Which steps compute follows from measured sizes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffkiln.passes.caching import Mask, magnitude
from diffkiln.passes.program.cache_schedule.base import METHOD, hooks
from diffkiln.passes.program.cache_schedule.fixed import Fixed


class MagCache(Fixed):
    """A schedule computed from `ratios`: the size of what the blocks add, divided by that of the step before."""

    counted: ClassVar[str] = "ratios"

    method: Literal["magcache"] = Field(description=METHOD)
    ratios: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        description="One measured ratio a step; the first is ignored."
    )
    threshold: float = Field(0.06, ge=0, description="Largest accumulated error that still allows reuse.")
    max_reused: int = Field(3, ge=1, description="Largest number of reusing steps in a row.")
    retention: float = Field(0.2, ge=0, lt=1, description="Share of the steps, from the first, that always compute.")

    @property
    def around(self) -> tuple[int, int]:
        return 0, 0

    def mask(self, count: int) -> Mask:
        self.check_length(self.ratios, count)
        return magnitude(self.ratios, self.threshold, self.max_reused, self.retention)

    def hook(self, pipe: Any) -> Any:
        return hooks().MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_reused,
            retention_ratio=self.retention,
            num_inference_steps=len(self.ratios),
            mag_ratios=list(self.ratios),
        )
