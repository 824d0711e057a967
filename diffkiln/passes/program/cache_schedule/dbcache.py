"""The first and the last blocks are computed in every step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkiln.passes.program.cache_schedule.base import METHOD
from diffkiln.passes.program.cache_schedule.fixed import ByInterval


class DBCache(ByInterval):
    """A schedule in which every step computes the first and the last blocks; the blocks between are reused."""

    method: Literal["dbcache"] = Field(description=METHOD)
    front: int = Field(1, ge=1, description="Number of first blocks that every step computes.")
    back: int = Field(0, ge=0, description="Number of last blocks that every step computes.")

    @property
    def around(self) -> tuple[int, int]:
        return self.front, self.back
