"""Replace the scheduler, or change its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import Outcome, ProgramPass, State
from diffkiln.record.steps import steps_with
from diffkiln.spec import Json, Target, suggest


class Scheduler(ProgramPass):
    """Replace the pipeline's scheduler by another of diffusers', or change its configuration.

    The new scheduler is made by `from_config` of the model's own, so options that both know are kept. The schedule is
    computed once, when the call is recorded: timesteps and coefficients are constants of the program, and nothing waits
    for the GPU between steps. A few-step distillation is a `fuse_lora` and this pass.
    """

    name: ClassVar[str] = "scheduler"
    summary: ClassVar[str] = "replace the scheduler or change its configuration"
    before: ClassVar = dict.fromkeys(
        ("guidance", "calibrate", "cache_schedule"), "the scheduler decides how many steps there are"
    )
    before_all: ClassVar = frozenset({"guidance", "calibrate", "cache_schedule"})
    examples: ClassVar = (
        {"name": "scheduler", "type": "EulerDiscreteScheduler", "config": {"timestep_spacing": "trailing"}},
        {"name": "scheduler", "config": {"shift": 3.0, "use_dynamic_shifting": False}},
    )

    component: str = Field("scheduler", pattern="^scheduler$", description="Always `scheduler`.")
    type: str | None = Field(None, min_length=1, description="Scheduler class of diffusers. Absent: the model's own.")
    config: Mapping[str, Json] = Field(
        default_factory=dict, description="Fields of the configuration to change; the others stay as in the model."
    )

    def check(self, state: State, target: Target, where: str) -> Sequence[Problem]:
        if state.scheduler is None:
            return [Problem(where, f"{state.class_name} has no scheduler", "Remove it.")]
        known = _compatible(state.scheduler)
        if self.type is not None and self.type not in known:
            hint = suggest(self.type, known) or f"There are {', '.join(sorted(known))}."
            mine = type(state.scheduler).__name__
            return [Problem(f"{where}.type", f"{self.type} is not a scheduler that can take the place of {mine}", hint)]
        names = set(inspect.signature(known[self.type or type(state.scheduler).__name__]).parameters)
        problems = [
            Problem(
                f"{where}.config.{key}",
                f"{self.type or type(state.scheduler).__name__} has no option {key!r}",
                suggest(key, names) or f"It has {', '.join(sorted(names))}.",
            )
            for key in self.config
            if key not in names
        ]
        if not problems:
            try:
                self._made(state)
            except Exception as error:  # whatever diffusers raises for values that do not fit
                problems.append(Problem(f"{where}.config", f"diffusers refuses them: {error}"))
        return problems

    def _made(self, state: State) -> Any:
        kind = _compatible(state.scheduler)[self.type or type(state.scheduler).__name__]
        return kind.from_config(state.scheduler.config, **self.config)

    def run(self, state: State) -> Outcome:
        before, after = state.scheduler, self._made(state)
        old = dict(before.config)
        changed = {k: v for k, v in dict(after.config).items() if not k.startswith("_") and old.get(k) != v}
        same = type(after) is type(before) and not changed
        settings = ", ".join(f"{key} {value}" for key, value in sorted(changed.items()) if key in self.config)
        note = type(after).__name__ + (f" with {settings}" if settings else "")
        steps = tuple(dict.fromkeys(steps_with(after, count) for count in state.wanted_steps)) if state.steps else ()
        return Outcome(replace(state, scheduler=after, steps=steps), not same, (note,))


def _compatible(scheduler: Any) -> dict[str, Any]:
    """Returns, by name, the schedulers that diffusers lists as compatible, and those that read the same betas, such as
    LCM's.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    mine = type(scheduler)
    kinds = [getattr(diffusers.schedulers, name, None) for name in dir(diffusers.schedulers)]
    every = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, SchedulerMixin)]
    names = {kind.__name__ for kind in scheduler.compatibles}
    return {
        kind.__name__: kind
        for kind in every
        if kind is mine or kind.__name__ in names or (_reads_betas(kind) and _reads_betas(mine))
    }


def _reads_betas(kind: type) -> bool:
    return "beta_schedule" in inspect.signature(kind).parameters


PLUGIN = Scheduler
