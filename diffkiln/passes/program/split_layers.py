"""Share out the blocks of a denoiser among several processes, each of which holds and runs a range of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkiln.bundle.manifest import PROCESSES
from diffkiln.errors import Problem
from diffkiln.models.context_parallel import check_alone
from diffkiln.passes.base import Fact, Outcome, Pass, ProgramPass, State
from diffkiln.program.layers import by_ranges, shared_out, sizes_of
from diffkiln.program.mesh import LAYERS
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec, Target


class SplitLayers(ProgramPass):
    """Share out the blocks of a denoiser among several processes, for one that does not fit into one device.

    Each process runs a range of blocks, of about equal bytes of weights, and holds no weights of others. What a range
    gives is sent to all processes, in one exchange. Everything around the blocks is computed by all. A call takes no
    less time than on one device: while one process runs its range, the others wait.

    `"parallel": {"layers": 2}` in the target adds this pass for the denoiser.
    """

    name: ClassVar[str] = "split_layers"
    summary: ClassVar[str] = "share out the denoiser's blocks among processes, to fit"
    after: ClassVar = {
        "guidance": "guidance decides how the denoiser is called",
        "split_guidance": "branches are split before their blocks are shared out",
        "cache_schedule": "a schedule decides which blocks run",
        "attention_backend": "a block runs on one device, with its kernel",
        "hoist": "what is computed ahead is shared out, too",
    }
    requires_not: ClassVar = {
        "slotted": "adapters are put into the slots of all blocks, and no process holds all of these. Remove the "
        "slots, or add a LoRA with the pass fuse_lora"
    }
    features: ClassVar = frozenset({PROCESSES})
    asked_at: ClassVar = "$.target.parallel.layers"
    examples: ClassVar = ({"name": "split_layers", "component": "transformer", "count": 2},)

    count: int = Field(ge=2, le=64, description="Number of processes, as in the target.")

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the pass for each denoiser if the target asks for it."""
        count = spec.parallel.get(LAYERS)
        if count is not None:
            yield from (cls(component=component, count=count) for component in state.denoisers)

    def provides(self) -> Iterable[Fact]:
        yield Fact("shared_by_processes", self.component, self.name)

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        wanted = spec.parallel.get(LAYERS, 1)
        if wanted != self.count:
            hint = f'Write "parallel": {{"layers": {self.count}}} in "target", or remove the pass.'
            yield Problem(where, f"the target shares out layers among {wanted} processes, not {self.count}", hint)
        for other in others:
            if other.component != self.component:
                continue
            if getattr(other, "whole", False):
                reason = f"{other.name} takes {self.component} whole, and processes run its blocks"
                yield Problem(where, reason, f'Give {other.name} "scope": "blocks".')
            if getattr(other, "engines_hold_weights", False):
                reason = f"the engines of {other.name} hold the weights of all blocks, so that every process would"
                yield Problem(where, reason, f'Choose another "backend" for {other.name}.')

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")

    def run(self, state: State) -> Outcome:
        note = f"{self.count} processes run a range of blocks each, one after the other"
        return Outcome(state.with_facts(self.provides()), True, (note,))

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        check_alone("run a denoiser's blocks on several")

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with the component's blocks shared out, and what each process holds of them.

        Raises:
            ValueError: there are fewer blocks than processes, or the call itself reads weights of blocks.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module = recording.modules[self.component]
        sizes = sizes_of(module)
        if len(sizes) < self.count:
            raise ValueError(
                f"{self.component} has {len(sizes)} repeated blocks, which {self.count} processes cannot share out. "
                f'Choose fewer processes, or remove "layers" from "parallel"'
            )
        owners = shared_out(sizes, self.count)
        programs = {name: by_ranges(program, owners, self.count) for name, program in module.programs.items()}
        notes = []
        for index in range(self.count):
            blocks = [block for block, owner in owners.items() if owner == index]
            held = sum(sizes[block] for block in blocks)
            notes.append(f"process {index}: {blocks[0]} to {blocks[-1]}, {held:,} bytes of weights")
        modules: Mapping[str, Any] = {**recording.modules, self.component: replace(module, programs=programs)}
        return replace(recording, modules=modules), notes


PLUGIN = SplitLayers
