"""Run a component in the first of several processes alone, which sends its results to the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkiln.bundle.manifest import PROCESSES
from diffkiln.errors import Problem
from diffkiln.passes.base import Outcome, Pass, ProgramPass, State, unknown_component
from diffkiln.program.first import by_first
from diffkiln.program.mesh import Mesh
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec, Target


class RunOnFirst(ProgramPass):
    """Run a component in the first process alone, such as a text encoder or a decoder.

    The first process sends what the component gives to the others, which hold no weights for it. A call takes no less
    time: the others wait meanwhile.

    `"parallel": {"first": ["text_encoder"]}` in the target adds this pass for each component that it names.
    """

    name: ClassVar[str] = "run_on_first"
    summary: ClassVar[str] = "run a component in the first process alone"
    after: ClassVar = {
        "hoist": "what is computed ahead is a call of the component, too",
        "split_tiles": "shared tiles are decoded by all processes",
    }
    features: ClassVar = frozenset({PROCESSES})
    asked_at: ClassVar = "$.target.parallel.first"
    examples: ClassVar = ({"name": "run_on_first", "component": "text_encoder", "count": 2},)

    count: int = Field(ge=2, le=128, description="Number of all processes, as in the target.")

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the pass for each component that the target names."""
        if spec.shared is not None:
            size = Mesh(spec.parallel).size
            yield from (cls(component=component, count=size) for component in dict.fromkeys(spec.shared.first))

    def check(self, state: State, target: Target, where: str) -> Sequence[Problem]:
        """Returns why the component cannot be run by one process; one that the pipeline lacks is found by its name."""
        if self.component in state.modules or where != self.asked_at:
            return super().check(state, target, where)
        return [replace(problem, where=where) for problem in unknown_component(self.component, state, where)]

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        named = spec.shared.first if spec.shared is not None else ()
        if self.component not in named or Mesh(spec.parallel).size != self.count:
            hint = f'Write "parallel": {{…, "first": ["{self.component}"]}} in "target", and leave out the pass.'
            yield Problem(where, "the target does not ask for it, or has another number of processes", hint)
        for other in others:
            if other.component == self.component and other is not self and PROCESSES in other.features:
                reason = f"{other.name} has all processes run {self.component}"
                yield Problem(where, reason, 'Name it in "first", or share it, but not both.')

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component in state.denoisers:
            others = [name for name in state.modules if name not in state.denoisers]
            hint = f"Name others, such as {', '.join(others)}." if others else "Remove it."
            yield Problem(where, f"{self.component} is the denoiser, which all processes share", hint)

    def run(self, state: State) -> Outcome:
        note = f"the first of {self.count} processes runs it, and sends its results to the others"
        return Outcome(state, True, (note,))

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with the component's calls made by the first process alone.

        Raises:
            ValueError: every process needs weights of the component.
        """
        calls: list[Mapping[str, Any]] = [
            {name: by_first(call, {self.component}, self.count) for name, call in programs.items()}
            for programs in recording.calls
        ]
        return replace(recording, calls=calls), ()


PLUGIN = RunOnFirst
