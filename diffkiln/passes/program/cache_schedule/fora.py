"""FORA: what all blocks add is reused."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkiln.passes.program.cache_schedule.base import METHOD
from diffkiln.passes.program.cache_schedule.fixed import ByInterval


class Fora(ByInterval):
    """A schedule in which every `interval`-th step computes; the others reuse what the repeated blocks added."""

    method: Literal["fora"] = Field(description=METHOD)

    @property
    def around(self) -> tuple[int, int]:
        return 0, 0
