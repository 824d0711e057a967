"""Let a UNet's self-attention run over fewer tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import MOST, matching, merge_tokens, repeated_blocks, self_attentions
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.spec import Target


class MergeTokens(ModelPass):
    """Merge similar tokens before self-attention in a UNet's transformer blocks, and split them after it (ToMe).

    Attention over fewer tokens is faster if there are many, and the image changes a little. Similarity decides at each
    call which tokens are merged, in tensor operations of fixed shapes.
    """

    name: ClassVar[str] = "merge_tokens"
    summary: ClassVar[str] = "merge similar tokens before a UNet's self-attention"
    examples: ClassVar = (
        {"name": "merge_tokens", "component": "unet", "ratio": 0.5, "blocks": ["down_blocks.0.*", "up_blocks.3.*"]},
    )

    ratio: Annotated[float, Field(gt=0, le=MOST)] = Field(0.5, description="Share of the tokens to merge.")
    blocks: tuple[str, ...] = Field(
        ("*",), description="Patterns of block names, such as down_blocks.0.*. Blocks with many tokens gain most."
    )

    def provides(self) -> Iterable[Fact]:
        return [Fact("tokens_merged", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        if not isinstance(module, UNet2DConditionModel):
            yield Problem(where, f"merge_tokens is for UNets, and {type(module).__name__} is none", "Remove it.")
            return
        names = [name for name, _ in repeated_blocks(module)]
        for index, pattern in enumerate(self.blocks):
            if not matching(names, [pattern]):
                hint = f"It has {names[0]} to {names[-1]}." if names else ""
                reason = f"the pattern {pattern!r} matches no block of {self.component}"
                yield Problem(f"{where}.blocks[{index}]", reason, hint)
        if not self_attentions(module, self.blocks):
            yield Problem(where, f"no block of {self.component} has self-attention to merge tokens for", "Remove it.")

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        names = merge_tokens(module, self.ratio, self.blocks)
        return [f"{len(names)} self-attentions merge {self.ratio:.0%} of their tokens"] if names else []

    @classmethod
    def restore(cls, module: torch.nn.Module, options: Mapping[str, Any]) -> None:
        merge_tokens(module, options["ratio"], options["blocks"])


PLUGIN = MergeTokens
