"""Drop blocks of a component."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import drop_blocks, droppable_blocks, matching
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.spec import Target


class Prune(ModelPass):
    """Drop repeated blocks by name; later blocks move up.

    A block can be dropped if the model runs a list of blocks in sequence, each on the result of the one before.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "drop blocks by name"
    before: ClassVar = {"quantize": "dropped blocks need not be quantized, and patterns name the remaining blocks"}
    moves_layers: ClassVar[str] = "blocks after a dropped one have its number"
    examples: ClassVar = (
        {"name": "prune", "component": "transformer", "blocks": ["single_transformer_blocks.3[0-7]"]},
    )

    blocks: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        description="Patterns of block names; matching blocks are dropped. Example: transformer_blocks.3."
    )

    def provides(self) -> Iterable[Fact]:
        return [Fact("pruned", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        blocks = droppable_blocks(module)
        if not blocks:
            yield Problem(where, f"{type(module).__name__} declares no repeated blocks to drop from", "Remove it.")
            return
        names = list(blocks)
        for index, pattern in enumerate(self.blocks):
            if not matching(names, [pattern]):
                hint = f"It has {names[0]} to {names[-1]}."
                yield Problem(
                    f"{where}.blocks[{index}]", f"the pattern {pattern!r} matches no block of {self.component}", hint
                )
        gone = matching(names, self.blocks)
        for home in sorted({name.rpartition(".")[0] for name in gone}):
            inside = [name for name in names if name.rpartition(".")[0] == home]
            if set(inside) <= set(gone):
                yield Problem(where, f"nothing would be left of {home}", "Keep one of its blocks.")
            if skipping := [name for name in inside if "skip" in inspect.signature(blocks[name].forward).parameters]:
                yield Problem(
                    where,
                    f"{home} is not a chain: some of its blocks, such as {skipping[-1]}, take what others skip to them",
                    "Remove it.",
                )

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        before = sum(tensor.numel() for tensor in module.parameters())
        total = len(droppable_blocks(module))
        gone = drop_blocks(module, self.blocks)
        dropped = before - sum(tensor.numel() for tensor in module.parameters())
        return [f"{len(gone)} of {total} blocks dropped, {dropped} weights"] if gone else []

    @classmethod
    def restore(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        drop_blocks(module, options["blocks"])


PLUGIN = Prune
