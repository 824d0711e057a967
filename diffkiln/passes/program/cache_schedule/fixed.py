"""Schedules that are written into the program: which steps compute is known before the call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Discriminator, Field, Tag

from diffkiln.errors import Problem
from diffkiln.passes.base import Outcome, State
from diffkiln.passes.caching import (
    Kept,
    Mask,
    Split,
    apply_schedule,
    call_sites_of,
    every,
    outputs_of,
    residuals,
    split,
    symbols,
)
from diffkiln.passes.program.cache_schedule.base import DYNAMIC, CacheSchedule
from diffkiln.program import Module, Program
from diffkiln.record.components import repeated_blocks
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Conflict, refuse


def _begins(steps: tuple[int, ...]) -> tuple[int, ...]:
    if steps and steps[0] == 0:
        raise refuse("its first step reuses, and nothing was kept before it", "Begin it with 1")
    return steps


Steps = Annotated[
    Annotated[tuple[Literal[0, 1], ...], AfterValidator(_begins), Tag("list")]
    | Annotated[Literal["calibrated"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "list"),
]
STEPS = 'One number a step. 1: computes. 0: reuses. "calibrated": the pass calibrate chooses the steps.'


class Fixed(CacheSchedule):
    """A schedule whose steps are decided when it is compiled."""

    #: The option that has one value for each step.
    counted: ClassVar[str] = "steps"

    dynamic: Literal[False] = Field(False, description=DYNAMIC)

    @abstractmethod
    def mask(self, count: int) -> Mask:
        """Returns which of `count` steps compute.

        Raises:
            ValueError: the options name another number of steps.
        """

    @property
    def around(self) -> tuple[int, int] | None:
        """Returns how many blocks in front and in back every step computes, where what the others add is kept."""
        return None

    @property
    def extrapolation(self) -> int:
        """Returns the order of the polynomial that continues what was kept."""
        return 0

    @property
    def is_calibrated(self) -> bool:
        """Returns True if a calibrate pass chooses the steps."""
        return False

    def kept(self, program: Program, module: Module) -> tuple[Kept, ...]:
        """Returns what a program of the component keeps."""
        if self.around is None:
            return outputs_of(program)
        return residuals(program, module.regions, *self.around)

    # -- from configuration --

    def check_model(self, module: torch.nn.Module, state: State, where: str) -> Iterable[Problem]:
        if self.around is None:
            return
        (front, back), blocks = self.around, len(repeated_blocks(module))
        if not blocks:
            reason = f"{type(module).__name__} declares no repeated blocks whose results could be kept"
            yield Problem(f"{where}.method", reason, "Choose mask or taylorseer.")
        elif front + back >= blocks:
            reason = f"{front} blocks in front and {back} in back leave none of {blocks} to reuse"
            yield Problem(where, reason, "Keep fewer.")

    def check_steps(self, state: State, calibrates: bool, where: str) -> Iterable[Problem]:
        yield from super().check_steps(state, calibrates, where)
        if not calibrates:
            yield from self._length_problems(state, where)

    def _length_problems(self, state: State, where: str) -> Iterator[Problem]:
        for count in state.steps:
            try:
                self.mask(count)
            except ValueError as error:
                yield Problem(f"{where}.{self.counted}", str(error), f"Give one for each of {count} steps.")

    def check_length(self, given: Sequence[Any], count: int) -> None:
        """Raises ValueError unless there is one value for each of `count` steps."""
        if len(given) != count:
            raise ValueError(f"names {len(given)} steps, and {self.component} is called in {count}")

    def run(self, state: State) -> Outcome:
        """Notes which steps will compute. Changes nothing if the number of steps is known and none reuses."""
        if self.is_calibrated:
            return Outcome(
                state.with_facts(self.provides()), True, ("the steps are chosen when the weights are there",)
            )
        masks = [self.mask(count) for count in state.steps]
        notes = tuple(map(_note, masks)) or ("a schedule of the steps that call it",)
        return Outcome(state.with_facts(self.provides()), not masks or not all(map(all, masks)), notes)

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module = recording.modules[self.component]
        splits = self.splits(recording)
        notes: list[str] = []
        calls: list[dict[str, Program]] = []
        reuses = False
        for fixed, programs in zip(recording.fixed, recording.calls, strict=True):
            scheduled: dict[str, Program] = {}
            for name, call in programs.items():
                call_sites = call_sites_of(call, self.component, fixed.get("num_inference_steps"))
                mask = self.mask(len(call_sites.sites))
                reuses = reuses or not all(mask)
                scheduled[name] = apply_schedule(call, self.component, call_sites, mask, splits, self.extrapolation)
                if _note(mask) not in notes:
                    notes.append(_note(mask))
            calls.append(scheduled)
        if not reuses:
            raise ValueError(f"no step that calls {self.component} would reuse one before it")
        programs = dict(module.programs)
        for part in splits.values():
            programs |= part.programs
        module = replace(module, programs=programs)
        return replace(recording, calls=calls, modules={**recording.modules, self.component: module}), notes

    def splits(self, recording: Recording) -> dict[str, Split]:
        """Returns the component's programs by name, each split where this schedule keeps values."""
        module = recording.modules[self.component]
        return {name: self._split(program, module) for name, program in module.programs.items()}

    def _split(self, program: Program, module: Module) -> Split:
        kept = self.kept(program, module)
        if not kept:
            raise ValueError(f"{self.called()} finds nothing to keep in {program.name} of {self.component}")
        return split(program, kept)


class Listed(Fixed):
    """A schedule whose steps may be listed, or chosen by a calibrate."""

    @property
    @abstractmethod
    def listed(self) -> tuple[int, ...] | str | None:
        """Returns the steps as the options have them."""

    @property
    def is_calibrated(self) -> bool:
        return self.listed == "calibrated"

    def with_steps(self, mask: Mask) -> Self:
        """Returns the schedule with the steps that a calibrate has chosen."""
        return self.model_copy(update={"steps": tuple(int(step) for step in mask)})

    def mask(self, count: int) -> Mask:
        assert isinstance(self.listed, tuple), "calibrate has chosen by now"
        self.check_length(self.listed, count)
        return tuple(bool(step) for step in self.listed)

    def check_steps(self, state: State, calibrates: bool, where: str) -> Iterable[Problem]:
        if not calibrates and not self.is_calibrated:
            yield from self._length_problems(state, where)
        elif not calibrates:
            yield Problem(f"{where}.steps", "no calibrate of the component stands before it", "Add one.")
        elif not self.is_calibrated:
            hint = 'Set them to "calibrated", and remove the interval.'
            yield Problem(f"{where}.steps", "calibrate chooses them", hint)
        else:
            yield from self.check_measured(where)

    def check_measured(self, where: str) -> Iterable[Problem]:
        """Returns why a calibrate cannot measure what the method costs."""
        return ()


class ByInterval(Listed):
    """A schedule whose steps compute at even distances, or as they are listed."""

    interval: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Distance between steps that compute: 2 means every second step."
    )
    start: int = Field(1, ge=1, description="Number of first steps that always compute.")
    end: int = Field(0, ge=0, description="Number of last steps that always compute.")
    steps: Steps | None = Field(None, description=f"Instead of an interval. {STEPS}")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if "interval" not in given and "steps" not in given:
            yield ("interval",), refuse(f"is needed by {cls.called()}", "Add it")
        for name in ("interval", "start", "end") if "steps" in given else ():
            if name in given:
                yield (name,), refuse("says nothing beside steps, which name each one", "Remove one of the two")

    @property
    def listed(self) -> tuple[int, ...] | str | None:
        return self.steps

    def mask(self, count: int) -> Mask:
        if self.interval is None:
            return super().mask(count)
        return every(count, self.interval, self.start, self.end)


def _note(mask: Mask) -> str:
    return f"{sum(mask)} of {len(mask)} steps compute: {symbols(mask)}"
