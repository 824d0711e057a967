"""How a denoiser that guides by a second evaluation is called: twice a step, once with a doubled batch, or once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Incompatible, Problem
from diffkiln.passes.base import Fact, Outcome, ProgramPass, Restored, State
from diffkiln.passes.caching import call_sites_of, symbols
from diffkiln.passes.guiding import are_pairs, join, no_second_evaluation, part, rebatched
from diffkiln.program import STEP, Program, is_rebatched
from diffkiln.record.pipeline import Rebatched, Recording
from diffkiln.spec import Conflict, Target, refuse

_BATCHES = {"doubled": "one call of a doubled batch a step", "halved": "two calls of half the batch a step"}


class Guidance(ProgramPass):
    """Change how often, and with which batch, classifier-free guidance calls the denoiser.

    `batch`: a pipeline that calls the denoiser twice a step, with the prompt and without, gets one call of a `doubled`
    batch. That costs less if a batch of one leaves the device idle. A pipeline with a doubled batch gets two calls of
    half of it (`halved`), which need less memory at once. `steps`: a step with 0 is not guided. Only the prompt's
    branch runs, which equals a guidance scale of 1. The pipeline's own arithmetic stays.
    """

    name: ClassVar[str] = "guidance"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "run guidance with another batch size, or only in some steps"
    before: ClassVar = {"cache_schedule": "a schedule counts the calls of a step"}
    requires_not: ClassVar = {"scheduled": "a schedule counts a step's calls. Put guidance before cache_schedule"}
    examples: ClassVar = (
        {"name": "guidance", "component": "transformer", "steps": [1, 1, 1, 1, 0, 0]},
        {"name": "guidance", "component": "transformer", "batch": "doubled"},
        {"name": "guidance", "component": "unet", "batch": "halved", "steps": [1, 1, 1, 1, 0, 0]},
    )

    steps: tuple[Literal[0, 1], ...] | None = Field(
        None,
        min_length=1,
        description="One number a step. 1: guided. 0: only the prompt's branch runs, as with a guidance scale of 1.",
    )
    batch: Literal["doubled", "halved"] | None = Field(
        None,
        description="doubled: one call of twice the batch replaces a step's two. halved: two calls replace one.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        steps = given.get("steps")
        if steps is None and "batch" not in given:
            yield ("steps",), refuse("neither steps nor a batch are given", 'Add one, such as "batch": "doubled"')
        elif "batch" in given and isinstance(steps, list | tuple) and steps:
            if all(step == 1 for step in steps):
                yield ("steps",), refuse("every step is guided, as without this option", "Remove it")
            elif all(step == 0 for step in steps):
                yield ("batch",), refuse("no step is guided, so there is nothing to batch", "Remove it")

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON, without those that are not given."""
        return self.model_dump(mode="json", exclude_none=True)

    def provides(self) -> Iterable[Fact]:
        return [Fact("guidance_changed", self.component, self.name)]

    # -- from configuration --

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
            return
        if reason := no_second_evaluation(module, state):
            yield Problem(where, f"{self.component} {reason}", "Remove guidance.")
        if self.batch and any(fact == Fact("scaled_together", self.component) for fact in state.facts):
            reason = "one scale of the activations is for the whole batch, so its halves would change each other"
            yield Problem(f"{where}.batch", reason, 'Quantize with "granularity": "per_row".')
        for count in state.steps if self.steps is not None else ():
            if len(self.steps or ()) != count:
                yield Problem(f"{where}.steps", self._miscounted(count), f"Give one for each of {count} steps.")

    def _miscounted(self, count: int) -> str:
        return f"names {len(self.steps or ())} steps, and {self.component} is called in {count}"

    def run(self, state: State) -> Outcome:
        notes: list[str] = []
        if self.batch is not None:
            notes.append(_BATCHES[self.batch])
        if self.steps is not None:
            guided = [bool(step) for step in self.steps]
            notes.append(f"{sum(guided)} of {len(guided)} steps are guided: {symbols(guided)}")
        changed = self.batch is not None or not all(self.steps or ())
        return Outcome(state.with_facts(self.provides()), changed, tuple(notes))

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        # diffusers guides every step, and calls the denoiser with its own batch.
        component = str(options["component"])
        if options.get("steps") is not None:
            raise Incompatible(
                f"diffusers guides {component} in every step, and this bundle leaves guidance out of some. Load the "
                "bundle without as_diffusers"
            )
        if component in bundle.compiled and is_rebatched(bundle.modules[component]) and not bundle.eager:
            raise Incompatible(
                f"the engines of {component} are for the batch that guidance has there ({options['batch']}), and "
                "diffusers calls it with another. Load the bundle without as_diffusers, or compile it with "
                '"on_incompatible": "eager" in "runtime", so that diffusers\' own blocks run'
            )

    def notices(self, recording: Recording, compiled: Collection[str]) -> Iterable[str]:
        """Yields what happens to guidance with as_diffusers, where the pipeline calls the denoiser in its own way."""
        if self.steps is not None:
            yield (
                f"guidance of {self.component} is left out of steps, which diffusers cannot do: the bundle cannot be "
                "loaded with as_diffusers"
            )
        elif self.component in compiled and is_rebatched(recording.modules[self.component]):
            yield (
                f"the engines of {self.component} are for another batch than diffusers calls it with: a pipeline "
                'that is loaded with as_diffusers needs "on_incompatible": "eager" in "runtime"'
            )

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with other calls of the component.

        Raises:
            ValueError: the component is not guided in a way that this could change, it cannot be told how, or it cannot
                be recorded at the other batch.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        wanted = [fixed.get("num_inference_steps") for fixed in recording.fixed]
        found = zip(recording.calls, wanted, strict=True)
        sites = [
            {name: call_sites_of(call, self.component, n).sites for name, call in calls.items()} for calls, n in found
        ]
        twice = any(are_pairs(steps) for each in sites for steps in each.values())
        if self.batch == "doubled" and not twice:
            raise ValueError(
                f"no step calls {self.component} twice: it is guided by a doubled batch already, by an argument, or "
                "not at all"
            )
        if self.batch == "halved" and twice:
            raise ValueError(f"a step calls {self.component} twice already, each time with half of the guided images")
        others: Mapping[str, Rebatched] = {}
        if self.batch == "doubled" or not twice:
            recording, others = rebatched(recording, self.component, twice)
        calls = [
            {name: self._rewritten(call, each[name], twice, others, recording) for name, call in programs.items()}
            for programs, each in zip(recording.calls, sites, strict=True)
        ]
        return replace(recording, calls=calls), ()

    def _rewritten(
        self,
        call: Program,
        sites: Sequence[tuple[int, ...]],
        twice: bool,
        others: Mapping[str, Rebatched],
        recording: Recording,
    ) -> Program:
        if twice and not are_pairs(sites):
            return call  # without a negative prompt some pipelines do not guide at all
        guided = [bool(step) for step in self.steps or [1] * len(sites)]
        if len(guided) != len(sites):
            raise ValueError(self._miscounted(len(sites)))
        in_two = self.batch == "halved" or (twice and self.batch is None)
        if in_two and not all(guided) and not any(op.name == STEP for op in call.ops):
            raise ValueError(
                "the call does not mark the ends of its steps, so they are counted, which two calls in some and one in "
                "others would confuse. Leave out steps, or guide with a doubled batch"
            )
        if twice:
            return join(call, self.component, sites, guided, others, recording.constants)
        if any(len(step) != 1 for step in sites):
            raise ValueError(f"some steps call {self.component} once, and others more than once")
        return part(call, self.component, [step[0] for step in sites], guided, others, in_two, recording.constants)


PLUGIN = Guidance
