"""Leave guidance out of some steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, Outcome, Pass, Plan
from diffkiln.passes.caching import lanes_of, symbols
from diffkiln.program import STEP, Op, Program, Ref, drop_dead, map_refs, refs
from diffkiln.record.pipeline import NEGATIVES, Recording
from diffkiln.spec import Target


class Guidance(Pass):
    """Leave classifier-free guidance out of the steps that `steps` names with 0: they call the denoiser once.

    It is for pipelines that call the denoiser twice a step, with the prompt and without. A step that is not guided
    takes what the first call gives in the place of both, which is guidance with a scale of 1.
    """

    name: ClassVar[str] = "guidance"
    summary: ClassVar[str] = "leave guidance out of some steps"
    requires_not: ClassVar = {"scheduled": "a schedule counts a step's calls. Put guidance before cache_schedule"}
    examples: ClassVar = ({"name": "guidance", "component": "transformer", "steps": [1, 1, 1, 1, 0, 0]},)

    steps: tuple[Literal[0, 1], ...] = Field(
        min_length=1, description="For each step whether it is guided (1), or calls the denoiser once (0)."
    )

    def provides(self) -> Iterable[Fact]:
        return [Fact("guided_in_part", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, plan: Plan, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in plan.denoisers:
            yield Problem(where, f"{self.component} is no part of the denoising run", "Choose the denoiser.")
        for count in plan.steps:
            if len(self.steps) != count:
                reason = f"names {len(self.steps)} steps, and {self.component} is called in {count}"
                yield Problem(f"{where}.steps", reason, f"Give one for each of {count} steps.")

    def run(self, plan: Plan) -> Outcome:
        guided = [bool(step) for step in self.steps]
        note = f"{sum(guided)} of {len(guided)} steps are guided: {symbols(guided)}"
        return Outcome(plan.with_facts(self.provides()), not all(guided), (note,))

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        return ()

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """The recording with calls left out.

        Raises:
            ValueError: no step calls the component twice, or the call with the prompt is not the first.
        """
        calls = [{name: self._unguided(call) for name, call in programs.items()} for programs in recording.calls]
        if calls == recording.calls:
            raise ValueError(
                f"no step calls {self.component} twice: it is guided by a doubled batch, by an argument, or not at all"
            )
        return replace(recording, calls=calls), ()

    def _unguided(self, call: Program) -> Program:
        lanes = lanes_of(call, self.component)
        steps: dict[int, list[Op]] = {}
        for index, (step, _) in sorted(lanes.place.items()):
            steps.setdefault(step, []).append(call.ops[index])
        if any(len(own) != 2 for own in steps.values()):
            return call
        if len(self.steps) != len(steps):
            raise ValueError(f"names {len(self.steps)} steps, and {self.component} is called in {len(steps)}")
        renamed: dict[str, Ref] = {}
        gone: set[int] = set()
        for guided, own in zip(self.steps, steps.values(), strict=True):
            kept, dropped = own
            if _reads_negative(call, kept) or kept.attrs["program"] != dropped.attrs["program"]:
                raise ValueError(f"the first of two calls of {self.component} in a step is not the one with the prompt")
            if not guided:
                gone.add(id(dropped))
                renamed |= dict(zip(dropped.outputs, map(Ref, kept.outputs), strict=True))

        def now(op: Op) -> Op:
            args, kwargs = map_refs((op.args, op.kwargs), lambda ref: renamed.get(ref.name, ref))
            return replace(op, args=args, kwargs=kwargs)

        return drop_dead(replace(call, ops=tuple(now(op) for op in call.ops if id(op) not in gone)))


def _reads_negative(call: Program, wanted: Op) -> bool:
    """Whether an operation depends on a negative prompt, but for what every later step inherits from its latents."""
    made: Mapping[str, Op] = {name: op for op in call.ops for name in op.outputs}
    tokens = {item.name: item.source["text"] for item in call.inputs if item.source.get("kind") == "tokens"}
    negative = {
        index
        for index, text in enumerate(call.texts)
        if any(row.get("keyword") in NEGATIVES or row.get("text") == "" for row in text["rows"])
    }
    waiting, seen = [ref.name for ref in refs(wanted.args)], set[str]()
    while waiting:
        name = waiting.pop()
        if tokens.get(name) in negative:
            return True
        if name in seen or name not in made or made[name].name == STEP:
            continue
        seen.add(name)
        waiting += [ref.name for ref in refs((made[name].args, made[name].kwargs))]
    return False
