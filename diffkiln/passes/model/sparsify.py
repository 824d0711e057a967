"""Keep two of each four neighbouring weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import Sparse24, matching, store
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.passes.layers import has_no_data, linear_layers
from diffkiln.spec import Target

#: The first GPUs with sparse tensor cores.
_SM = (8, 0)
#: One byte tells the places of two fours, so a row is a multiple of eight.
_WIDTH = 8


class Sparsify(ModelPass):
    """Keep the two largest of each four neighbouring weights of linear layers: 2:4 semi-structured sparsity.

    The kept weights and their places take 0.53 to 0.56 times the space (float32, bfloat16). A model that was not
    trained for sparsity loses quality. torchao's magnitude sparsifier chooses the weights.
    """

    name: ClassVar[str] = "sparsify"
    summary: ClassVar[str] = "make linear layers 2:4 sparse"
    before: ClassVar = {"quantize": "quantized weights cannot be made sparse"}
    requires_not: ClassVar = {
        "quantized": "quantize leaves no plain weights to choose from. Put sparsify on other layers' components",
        "gguf": "a GGUF file has quantized weights already. Give the original weights",
    }
    examples: ClassVar = ({"name": "sparsify", "component": "transformer", "exclude": ["*norm*", "proj_out"]},)

    include: tuple[str, ...] = Field(("*",), description="Patterns of the linear layers to make sparse.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the linear layers to leave unchanged.")

    def provides(self) -> Iterable[Fact]:
        return [Fact("sparse", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if target.device != "cuda" or target.capability < _SM:
            has = f"SM {target.compute_capability}" if target.device == "cuda" else "no GPU"
            yield Problem(
                where,
                f"2:4 sparsity needs the sparse tensor cores of SM 8.0 or later, and {target.name} has {has}",
                "Remove it, or choose another target.",
            )
        layers = linear_layers(module)
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for index, pattern in enumerate(patterns):
                if not matching(list(layers), [pattern]):
                    reason = f"the pattern {pattern!r} matches no linear layer of {self.component}"
                    yield Problem(f"{where}.{field}[{index}]", reason)
        if not self._chosen(module):
            yield Problem(where, f"no linear layer of {self.component} is left to make sparse", "Remove it.")

    def _chosen(self, module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
        layers = linear_layers(module)
        left = set(matching(list(layers), self.include)) - set(matching(list(layers), self.exclude))
        return {name: layer for name, layer in layers.items() if name in left and layer.in_features % _WIDTH == 0}

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        chosen = self._chosen(module)
        count = sum(layer.weight.numel() for layer in chosen.values())
        for layer in chosen.values():
            parts = None if has_no_data(layer.weight) else compressed(layer.weight.detach())
            store(layer, Sparse24(), parts)
        return [f"{len(chosen)} linear layers, half of {count} weights kept"] if chosen else []


def compressed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the two largest of each four neighbours and their places, as `Sparse24` stores them.

    The rule is that of torchao's WeightNormSparsifier with blocks of (1, 4) and two zeros in each.
    """
    rows, columns = weight.shape
    fours = weight.reshape(rows, columns // 4, 4)
    indices = fours.abs().topk(2, dim=-1, sorted=True).indices.sort(dim=-1).values
    data = fours.gather(-1, indices).reshape(rows, columns // 2)
    two_bits = indices.reshape(rows, columns // 8, 4).to(torch.uint8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    where = (two_bits << shifts).sum(dim=-1).to(torch.uint8)
    return {"weight_data": data, "weight_where": where}


PLUGIN = Sparsify
