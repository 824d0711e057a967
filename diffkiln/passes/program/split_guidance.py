"""Run the two branches of guidance on two processes, which exchange their results once a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from diffkiln.bundle.manifest import PROCESSES
from diffkiln.errors import Incompatible, Problem
from diffkiln.models.context_parallel import check_alone
from diffkiln.passes.base import Fact, Outcome, Pass, ProgramPass, Restored, State
from diffkiln.passes.caching import call_sites_of
from diffkiln.passes.guiding import are_pairs, no_second_evaluation, part, rebatched, spread
from diffkiln.program import Program
from diffkiln.program.mesh import GUIDANCE
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec, Target


class SplitGuidance(ProgramPass):
    """Run the branches of classifier-free guidance on two processes: one denoises with the prompt, one without it.

    Both processes run the same program. In every step each makes one of the two calls of the denoiser, and they
    exchange what it gives; a doubled batch is split into its two parts first. Everything else is computed by both.

    `"parallel": {"guidance": 2}` in the target adds this pass for the denoiser.
    """

    name: ClassVar[str] = "split_guidance"
    summary: ClassVar[str] = "run the two branches of guidance on two processes"
    after: ClassVar = {"scheduler": "the scheduler decides the steps"}
    before: ClassVar = {
        "cache_schedule": "a schedule counts the calls of a step",
        "hoist": "what is computed ahead is each process's own",
    }
    requires_not: ClassVar = {
        "guidance_changed": "guidance has changed how the denoiser is called. Remove guidance: its branches run on "
        "processes of their own",
        "scheduled": "a schedule counts a step's calls. Put split_guidance before cache_schedule",
        "scaled_together": "one scale of the activations is for the whole batch, so its branches would change each "
        'other. Quantize with "granularity": "per_row"',
    }
    features: ClassVar = frozenset({PROCESSES})
    asked_at: ClassVar = "$.target.parallel.guidance"
    examples: ClassVar = ({"name": "split_guidance", "component": "transformer"},)

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the pass for each denoiser if the target asks for two processes."""
        if spec.parallel.get(GUIDANCE) is not None:
            yield from (cls(component=component) for component in state.denoisers)

    def provides(self) -> Iterable[Fact]:
        yield Fact("shared_by_processes", self.component, self.name)

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        if spec.parallel.get(GUIDANCE) is None:
            hint = 'Add "parallel": {"guidance": 2} to "target", or remove the pass.'
            yield Problem(where, "the target has one process for both branches", hint)

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
        elif reason := no_second_evaluation(module, state):
            hint = 'Remove "guidance" from "parallel".'
            yield Problem(where, f"{self.component} {reason}, so there are no two branches", hint)

    def run(self, state: State) -> Outcome:
        note = "two processes run a branch each, and exchange their results once a step"
        return Outcome(state.with_facts(self.provides()), True, (note,))

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        component = str(options["component"])
        if component in bundle.compiled and not bundle.eager:
            raise Incompatible(
                f"the engines of {component} are for one branch of guidance on each of two processes, and diffusers "
                "runs both on one. Load the bundle without as_diffusers"
            )

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        check_alone("run the branches of guidance on two")

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with one call of the component a step, whose arguments are each process's own.

        Raises:
            ValueError: the component is not guided in a way that could be split, or it cannot be recorded at half its
                batch.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        sites = self._sites(recording, recording.calls)
        if not any(are_pairs(steps) for each in sites for steps in each.values()):
            recording = self._parted(recording, sites)
            sites = self._sites(recording, recording.calls)
        calls = [
            {name: self._spread(call, each[name]) for name, call in programs.items()}
            for programs, each in zip(recording.calls, sites, strict=True)
        ]
        return replace(recording, calls=calls), ()

    def _sites(
        self, recording: Recording, calls: Sequence[Mapping[str, Program]]
    ) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
        wanted = [fixed.get("num_inference_steps") for fixed in recording.fixed]
        return [
            {name: call_sites_of(call, self.component, count).sites for name, call in programs.items()}
            for programs, count in zip(calls, wanted, strict=True)
        ]

    def _parted(self, recording: Recording, sites: Sequence[Mapping[str, Sequence[tuple[int, ...]]]]) -> Recording:
        """Returns the recording with two calls of half the batch in the place of each call."""
        recording, others = rebatched(recording, self.component, False)
        calls: list[dict[str, Program]] = []
        for programs, each in zip(recording.calls, sites, strict=True):
            parted: dict[str, Program] = {}
            for name, call in programs.items():
                if any(len(step) != 1 for step in each[name]):
                    raise ValueError(f"some steps call {self.component} once, and others more than once")
                guided = [True] * len(each[name])
                own = [step[0] for step in each[name]]
                parted[name] = part(call, self.component, own, guided, others, True, recording.constants)
            calls.append(parted)
        return replace(recording, calls=calls)

    def _spread(self, call: Program, sites: Sequence[tuple[int, ...]]) -> Program:
        # Without a negative prompt some pipelines do not guide at all: both processes then run the same.
        return spread(call, self.component, sites) if are_pairs(sites) else call


PLUGIN = SplitGuidance
