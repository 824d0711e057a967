"""Share the tokens of an image or a video among several processes, which exchange heads for tokens at attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkiln.bundle.manifest import PROCESSES
from diffkiln.errors import Incompatible, Problem
from diffkiln.models.context_parallel import processes_started, share_context
from diffkiln.passes.base import Fact, Outcome, Pass, ProgramPass, Restored, State
from diffkiln.passes.sequencing import share_module
from diffkiln.passes.tiling import spread_preambles
from diffkiln.program import Mesh, Program
from diffkiln.program.mesh import SEQUENCE
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec, Target


class SplitSequence(ProgramPass):
    """Share the tokens of a denoiser's blocks among several processes (Ulysses).

    Every process computes a share of the tokens. At an attention, each sends its tokens of other heads to the processes
    that have these heads, attends with all tokens of its own heads, and gets its tokens of all heads back. Blocks are
    split there, so that engines are built for the parts before and after. Attention to keys that every process has,
    such as those of a prompt, exchanges nothing. Where `hoist` has a component called ahead once for each step, each
    process makes every so many of these calls, and all get the results, if that spares reading more bytes of weights
    than it sends.

    `"parallel": {"sequence": 4}` in the target adds this pass for the denoiser.

    Source: Jacobs and others, "DeepSpeed Ulysses", 2023, https://arxiv.org/abs/2309.14509.
    """

    name: ClassVar[str] = "split_sequence"
    summary: ClassVar[str] = "share the tokens of the denoiser's blocks among processes"
    after: ClassVar = {
        "guidance": "guidance decides how the denoiser is called",
        "split_guidance": "branches are split before their tokens",
        "cache_schedule": "a schedule decides which blocks run",
        "attention_backend": "attention is exchanged around its kernel",
        "hoist": "calls that are made ahead are shared, too",
    }
    features: ClassVar = frozenset({PROCESSES})
    asked_at: ClassVar = "$.target.parallel.sequence"
    examples: ClassVar = ({"name": "split_sequence", "component": "transformer", "count": 2},)

    count: int = Field(ge=2, le=64, description="Number of processes, as in the target.")

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the pass for each denoiser if the target asks for several processes."""
        count = spec.parallel.get(SEQUENCE)
        if count is not None:
            yield from (cls(component=component, count=count) for component in state.denoisers)

    def provides(self) -> Iterable[Fact]:
        yield Fact("shared_by_processes", self.component, self.name)

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        wanted = spec.parallel.get(SEQUENCE, 1)
        if wanted != self.count:
            hint = f'Write "parallel": {{"sequence": {self.count}}} in "target", or remove the pass.'
            yield Problem(where, f"the target shares a sequence among {wanted} processes, not {self.count}", hint)
        for other in others:
            if other.component == self.component and getattr(other, "whole", False):
                reason = f"{other.name} takes {self.component} whole, and processes exchange tensors within it"
                yield Problem(where, reason, f'Give {other.name} "scope": "blocks".')

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")

    def run(self, state: State) -> Outcome:
        note = f"{self.count} processes share the tokens, and exchange heads for tokens at attention"
        return Outcome(state.with_facts(self.provides()), True, (note,))

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        component = str(options["component"])
        if component in bundle.compiled and not bundle.eager:
            raise Incompatible(
                f"the engines of {component} are for parts of its blocks and a share of the tokens, and diffusers runs "
                "whole blocks. Load the bundle without as_diffusers"
            )

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        """Has diffusers share the tokens in its own way, where several processes were started."""
        if processes_started() > 1:
            name = str(options["component"])
            share_context(pipe.components[name], name, int(options["count"]))

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with the component's programs over shares of the tokens.

        Raises:
            ValueError: tokens or heads cannot be shared evenly, or no block has an attention that could be split.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module, split = share_module(recording.modules[self.component], self.count)
        if not split:
            raise ValueError(
                f"no repeated block of {self.component} has an attention between its own tokens, so there is nothing "
                'that processes could share. Remove "sequence" from "parallel"'
            )
        notes: dict[str, None] = {}

        def spread(call: Program) -> Program:
            shared, made = spread_preambles(call, module, Mesh({SEQUENCE: self.count}))
            notes.update(dict.fromkeys(made))
            return shared

        calls = [{name: spread(call) for name, call in programs.items()} for programs in recording.calls]
        modules = {**recording.modules, self.component: module}
        return replace(recording, calls=calls, modules=modules), tuple(notes)


PLUGIN = SplitSequence
