"""Measure what reuse costs at each step of the real pipeline, and choose the steps of a caching schedule by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr

from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, Outcome, Pass, ProgramPass, State
from diffkiln.program.images import IMAGES
from diffkiln.spec import Conflict, Spec, Target, refuse
from diffkiln.spec.prompts import digest_of, read_prompts


class Calibrate(ProgramPass):
    """Choose the steps of the `cache_schedule` that follows, whose `steps` are "calibrated".

    The real pipeline draws the prompts once and keeps the values that every step would keep. Each step is then computed
    again from the values of every earlier step, and the change of its latents is the cost. Dynamic programming finds
    the schedules with the least total cost: with as many computed steps as `computed` says, or with as few as keep the
    `metric` `at_least` so high. The `tried` cheapest schedules, and the one with even distances, then draw the prompts,
    and the one with the best metric is taken.

    The first variant is calibrated; others, which have as many steps, get the same steps.

    The metric `psnr` is in dB, against the images without a schedule, averaged over the prompts. A caller of
    `diffkiln.compile` can give other metrics as functions by name.
    """

    name: ClassVar[str] = "calibrate"
    summary: ClassVar[str] = "choose the steps of a caching schedule by measuring images"
    before: ClassVar = {"cache_schedule": "it chooses the schedule's steps"}
    examples: ClassVar = (
        {"name": "calibrate", "component": "transformer", "prompts": "prompts.txt", "computed": 14},
        {"name": "calibrate", "component": "transformer", "prompts": "prompts.txt", "metric": "psnr", "at_least": 30.0},
    )

    prompts: str = Field(min_length=1, description="Text file, relative to the spec, with one prompt a line.")
    seed: int = Field(
        0, ge=0, description="Seed of the first prompt's noise; each further prompt uses the next integer."
    )
    computed: int | None = Field(None, ge=1, description="Number of steps that compute; the others reuse.")
    tried: int = Field(8, ge=1, le=256, description="Number of promising schedules to draw with and compare.")
    metric: str = Field(
        "psnr", min_length=1, description="Metric that compares the images with those of the full schedule."
    )
    at_least: float | None = Field(None, description="Lowest value of the metric that is accepted.")

    _texts: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if "computed" in given and "at_least" in given:
            yield ("at_least",), refuse("is a floor, beside a budget of computed steps", "Remove one of the two")
        elif "computed" not in given and "at_least" not in given:
            yield ("computed",), refuse("neither a budget of steps is given, nor a floor", "Add computed or at_least")

    @property
    def texts(self) -> tuple[str, ...]:
        """Returns the prompts, once the pass is prepared."""
        return self._texts

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        ready = self.model_copy()
        ready._texts = tuple(read_prompts(base / self.prompts))
        return ready

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON, with the prompts' digest instead of a local path."""
        written = {key: value for key, value in super().options().items() if value is not None}
        if self._texts:
            written |= {"prompts": digest_of(self._texts), "count": len(self._texts)}
        return written

    def provides(self) -> Iterable[Fact]:
        return [Fact("calibrated", self.component, self.name)]

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        if not any(other.component == self.component and "calibrated" in other.takes for other in others):
            hint = 'Add a cache_schedule with "steps": "calibrated".'
            yield Problem(where, "no cache_schedule of the component would use it", hint)
        if any(variant.call.get(keyword) is not None for variant in spec.variants for keyword in IMAGES):
            reason = "calibrate draws from prompts alone, and the call takes images"
            yield Problem(where, reason, "Give the steps of the schedule themselves.")
        if any(variant.fixes_the_prompt for variant in spec.variants):
            reason = "the inputs fix the prompt, and calibrate draws others"
            yield Problem(f"{where}.prompts", reason, "Give the steps of the schedule themselves.")

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
        elif len(state.steps) != 1:
            reason = f"one schedule is for one number of steps, and the variants have {list(state.steps) or 'several'}"
            yield Problem(where, reason, "Compile them into bundles of their own.")
        elif state.steps[0] < 2:
            yield Problem(where, "there is one step, so none can reuse", "Remove it.")
        elif self.computed is not None and self.computed >= state.steps[0]:
            reason = f"of {state.steps[0]} steps {self.computed} compute, so none reuses"
            yield Problem(f"{where}.computed", reason, "Give fewer.")

    def run(self, state: State) -> Outcome:
        wanted = f"{self.computed} computed steps" if self.computed else f"{self.metric} of at least {self.at_least:g}"
        note = f"on {len(self._texts)} prompts, for {wanted}"
        return Outcome(state.with_facts(self.provides()), True, (note,))

    @property
    def rewrites(self) -> bool:
        return True

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        return ()


PLUGIN = Calibrate
