"""Share the tiles of a decoder among several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from diffkiln.bundle.manifest import PROCESSES
from diffkiln.errors import Problem
from diffkiln.passes.base import Outcome, Pass, ProgramPass, State
from diffkiln.passes.tiling import parts_of, spread_parts
from diffkiln.program import Mesh, Program
from diffkiln.program.mesh import GUIDANCE, LAYERS, SEQUENCE
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec

#: Of the pipelines that have several components which decode, and what is said where there is none.
_USUAL = "vae"


class SplitTiles(ProgramPass):
    """Share the tiles of a decoder among all processes, or the images of a batch that it decodes one by one.

    Each process decodes every so many tiles, and all get the results. Tiles are shared that have one size: of ten on
    four processes, each decodes three. Blending is computed by all. Which operations are a tile is found by what they
    need of each other.

    `"parallel": {"sequence": 4, "tiles": true}` in the target adds this pass. The pass `vae` makes the tiles.
    """

    name: ClassVar[str] = "split_tiles"
    summary: ClassVar[str] = "share the tiles of a decoder among processes"
    after: ClassVar = {"vae": "there are tiles to share once an image is decoded in tiles"}
    features: ClassVar = frozenset({PROCESSES})
    asked_at: ClassVar = "$.target.parallel.tiles"
    examples: ClassVar = ({"name": "split_tiles", "component": "vae", "sequence": 2},)

    guidance: int = Field(1, ge=1, le=2, description="Number of processes along `guidance`, as in the target.")
    layers: int = Field(1, ge=1, le=64, description="Number of processes along `layers`, as in the target.")
    sequence: int = Field(1, ge=1, le=64, description="Number of processes along `sequence`, as in the target.")

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the pass for what decodes if the target asks for it."""
        if spec.shared is None or not spec.shared.tiles:
            return
        found = [name for name, module in state.modules.items() if hasattr(module, "decode")]
        yield from (cls(component=name, **spec.parallel) for name in found or [_USUAL])

    @property
    def mesh(self) -> Mesh:
        """Returns the processes."""
        counts = {GUIDANCE: self.guidance, LAYERS: self.layers, SEQUENCE: self.sequence}
        return Mesh({axis: count for axis, count in counts.items() if count > 1})

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        if spec.parallel != self.mesh.counts or not self.mesh.counts:
            found = Mesh(spec.parallel)
            reason = f"the target has other processes ({found})" if found.counts else "the target has one process"
            yield Problem(where, reason, 'Write "tiles": true in its "parallel", and leave out the pass.')
        beside = [other for other in others if other.component == self.component]
        if not any(other.decodes for other in beside):
            reason = f"{self.component} decodes an image in one piece, so there are no tiles to share"
            hint = f'Add {{"name": "vae", "component": "{self.component}", "tiling": true}} to "passes".'
            yield Problem(where, reason, hint)
        for other in beside:
            if getattr(other, "whole", False):
                reason = f"{other.name} takes {self.component} whole, and processes exchange tensors within it"
                yield Problem(where, reason, f'Remove {other.name} of {self.component}, or "tiles".')

    def run(self, state: State) -> Outcome:
        return Outcome(state, True, (f"{self.mesh.size} processes share the tiles",))

    # -- the programs --

    @property
    def rewrites(self) -> bool:
        return True

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with the component's tiles shared, and how many of them each process decodes.

        Raises:
            ValueError: no two tiles are alike.
        """
        if self.component not in recording.modules:
            raise ValueError(f"the call never calls {self.component}")
        module, notes = recording.modules[self.component], list[str]()
        programs: dict[str, Program] = {}
        for name, program in module.programs.items():
            parts = parts_of(program)
            programs[name], own = spread_parts(program, parts, self.mesh)
            if own:
                notes.append(f"{name}: each process decodes {own} of {len(parts)} tiles")
        if not notes:
            raise ValueError(
                f"{self.component} has no two tiles of one size, so there is nothing that processes could share. "
                'Choose a smaller "tile", or remove "tiles" from "parallel"'
            )
        modules: Mapping[str, Any] = {**recording.modules, self.component: replace(module, programs=programs)}
        return replace(recording, modules=modules), notes


PLUGIN = SplitTiles
