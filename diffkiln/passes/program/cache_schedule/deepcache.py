"""A UNet's last layers are computed in every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import State
from diffkiln.passes.caching import Kept, deep_features
from diffkiln.passes.program.cache_schedule.base import METHOD
from diffkiln.passes.program.cache_schedule.fixed import ByInterval
from diffkiln.program import Module, Program


class DeepCache(ByInterval):
    """A schedule for UNets: every step computes the last `depth` layers of the upper path; values from below are
    reused.
    """

    method: Literal["deepcache"] = Field(description=METHOD)
    depth: int = Field(1, ge=1, description="Number of up-block layers that every step computes.")

    def kept(self, program: Program, module: Module) -> tuple[Kept, ...]:
        return deep_features(program, self.depth)

    def check_model(self, module: Any, state: State, where: str) -> Iterable[Problem]:
        kind = type(module).__name__
        if not hasattr(module, "up_blocks"):
            reason = f"deepcache is for UNets, and {kind} has no skip connections"
            yield Problem(f"{where}.method", reason, "Choose dbcache, fora or taylorseer.")
            return
        layers = sum(len(block.resnets) for block in module.up_blocks)
        if self.depth > layers:
            yield Problem(f"{where}.depth", f"the way up of {kind} has {layers} layers", f"Choose 1 to {layers}.")
