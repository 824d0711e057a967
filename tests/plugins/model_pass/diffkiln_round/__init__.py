"""A pass of another distribution: it rounds the weights of linear layers to multiples of a power of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from diffkiln.passes.base import ModelPass


class Round(ModelPass):
    """Rounds the weights of linear layers to multiples of a power of two."""

    name: ClassVar[str] = "round"
    summary: ClassVar[str] = "round the weights of linear layers"
    examples: ClassVar = ({"name": "round", "component": "transformer", "bits": 6},)
    after: ClassVar = {"fuse_qkv": "projections are rounded once they are one"}
    before: ClassVar = {"quantize": "quantized weights are no plain numbers"}

    bits: int = Field(8, ge=1, le=16, description="Binary digits after the point.")

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        layers = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        for layer in layers:
            if not layer.weight.is_meta:  # some blocks of a large component come without data
                layer.weight.data = torch.round(layer.weight.data * 2**self.bits) / 2**self.bits
        return [f"{len(layers)} linear layers"] if layers else []


PLUGIN = Round
