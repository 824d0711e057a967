"""Criteria that diffusers' hooks evaluate at each step: the bundle runs as diffusers only."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, Outcome, State
from diffkiln.passes.program.cache_schedule.base import DYNAMIC, METHOD, CacheSchedule, hooks
from diffkiln.record.pipeline import Recording

THRESHOLD = "Largest relative change that still allows reuse."


class Dynamic(CacheSchedule):
    """A schedule that is decided while the pipeline runs."""

    dynamic: Literal[True] = Field(description=DYNAMIC)

    def objection(self, pipeline: str, source: str) -> tuple[str, str] | None:
        """Returns what a pipeline's class, of which the source is given, lacks for the hook: the reason and the
        hint."""
        return None

    def check_model(self, module: torch.nn.Module, state: State, where: str) -> Iterable[Problem]:
        if Fact("guidance_changed", self.component) in state.facts:
            reason = "guidance rewrites the program, and with dynamic diffusers runs without one"
            yield Problem(f"{where}.dynamic", reason, "Remove guidance, or choose a fixed schedule.")
        elif not hasattr(module, "enable_cache"):
            reason = f"diffusers gives {type(module).__name__} no enable_cache"
            yield Problem(where, reason, "Choose a fixed schedule.")
        elif objection := self.objection(state.class_name, _source_of(state.class_name)):
            yield Problem(f"{where}.method", *objection)

    def run(self, state: State) -> Outcome:
        return Outcome(state.with_facts(self.provides()), True, ("decided at each step, by diffusers' hooks",))

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        method = self.called().removeprefix("dynamic ")
        return replace(recording, reason=f"{method} decides at each step what to compute"), ()


class DynamicFirstBlock(Dynamic):
    """A schedule that reuses the other blocks while the first one's contribution changes by less than `threshold`."""

    method: Literal["first_block"] = Field(description=METHOD)
    threshold: float = Field(ge=0, description=THRESHOLD)

    def objection(self, pipeline: str, source: str) -> tuple[str, str] | None:
        if "cache_context(" in source:
            return None
        return f"{pipeline} does not tell diffusers' hooks which of its calls is which", "Choose a fixed schedule."

    def hook(self, pipe: Any) -> Any:
        return hooks().FirstBlockCacheConfig(threshold=self.threshold)


class SeaCache(Dynamic):
    """A schedule that reuses the blocks while the accumulated change of their spectrum stays below `threshold`."""

    method: Literal["seacache"] = Field(description=METHOD)
    threshold: float = Field(ge=0, description=THRESHOLD)

    def objection(self, pipeline: str, source: str) -> tuple[str, str] | None:
        if re.search(r"cache_context\([^)]*sigma=", source):
            return None
        reason = f"{pipeline} does not tell seacache its steps and sigmas, so it would reuse nothing"
        return reason, "Choose first_block."

    def hook(self, pipe: Any) -> Any:
        return hooks().SeaCacheConfig(threshold=self.threshold)


class OfAttentions(Dynamic):
    """A hook of attentions, inside the blocks: it need not know which call of a step it is in."""

    hook_needs_context: ClassVar[bool] = False

    interval: int = Field(ge=2, description="Distance between calls of an attention that compute.")

    def provides(self) -> Iterable[Fact]:
        yield from super().provides()
        yield Fact("hooked_inside", self.component, self.name)

    def configured(self, kind: Any, pipe: Any) -> Any:
        """Returns a configuration of diffusers, for attentions in space."""
        return kind(
            spatial_attention_block_skip_range=self.interval, current_timestep_callback=lambda: pipe.current_timestep
        )


class PyramidAttention(OfAttentions):
    """Pyramid attention broadcast: every `interval`-th call of an attention computes."""

    method: Literal["pab"] = Field(description=METHOD)

    def hook(self, pipe: Any) -> Any:
        return self.configured(hooks().PyramidAttentionBroadcastConfig, pipe)


class FasterCache(OfAttentions):
    """FasterCache: every `interval`-th call of an attention computes, in both halves of a doubled batch."""

    method: Literal["fastercache"] = Field(description=METHOD)

    def objection(self, pipeline: str, source: str) -> tuple[str, str] | None:
        if re.search(r"\[latents\] \* 2", source):
            return None
        reason = f"fastercache splits a doubled batch, and {pipeline} does not guide with one"
        return reason, "Choose first_block."

    def hook(self, pipe: Any) -> Any:
        return self.configured(hooks().FasterCacheConfig, pipe)


def _source_of(class_name: str) -> str:
    """Returns the code of a pipeline's class; empty if diffusers does not have it."""
    kind = getattr(importlib.import_module("diffusers"), class_name, None)
    return inspect.getsource(kind) if kind is not None else ""
