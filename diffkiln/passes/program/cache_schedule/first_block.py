"""The first block is computed in every step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkiln.passes.program.cache_schedule.base import METHOD
from diffkiln.passes.program.cache_schedule.fixed import ByInterval


class FirstBlock(ByInterval):
    """A schedule in which every step computes the first block; steps between reuse what the other blocks added."""

    method: Literal["first_block"] = Field(description=METHOD)

    @property
    def around(self) -> tuple[int, int]:
        return 1, 0
