"""Quantize the linear layers of a component."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, Pass, Plan
from diffkiln.spec import Target

#: Type → torchao's configuration of it, and the options that differ from its own defaults.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8_weight_only": ("Int8WeightOnlyConfig", {"version": 2}),
    "int8_dynamic": ("Int8DynamicActivationInt8WeightConfig", {"version": 2}),
    "float8_weight_only": ("Float8WeightOnlyConfig", {"version": 2}),
}


class Quantize(Pass):
    """Quantize the linear layers of a component; norms, convolutions and embeddings stay as they are.

    The types are torchao's. `int8_weight_only`: int8 weights with one scale a row, symmetric, activations untouched.
    `int8_dynamic`: the same weights, activations quantized to int8 as they come, one scale a token.
    `float8_weight_only`: float8 (e4m3) weights with one scale a row.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "quantize the linear layers of a component"

    backend: Literal["torchao"] = Field("torchao", description="The library that quantizes.")
    type: Literal["int8_weight_only", "int8_dynamic", "float8_weight_only"] = Field(
        description="What becomes of the weights."
    )
    include: tuple[str, ...] = Field(("*",), description="Patterns of the names of linear layers to quantize.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the names of linear layers to leave alone.")

    def provides(self) -> Iterable[Fact]:
        return [Fact("quantized", self.component)]

    def check_module(self, module: torch.nn.Module, plan: Plan, target: Target, where: str) -> Iterable[Problem]:
        names = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
        everything = [name for name, _ in module.named_modules()]
        for field, patterns, among in (("include", self.include, names), ("exclude", self.exclude, everything)):
            for index, pattern in enumerate(patterns):
                if not any(fnmatchcase(name, pattern) for name in among):
                    yield Problem(
                        f"{where}.{field}[{index}]", f"the pattern {pattern!r} matches no layer of {self.component}"
                    )
        if not any(self.chosen(name) for name in names):
            yield Problem(where, f"no linear layer of {self.component} is left to quantize")

    def chosen(self, name: str) -> bool:
        """Whether the linear layer of this name is quantized."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        import torchao.quantization

        layers = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
        chosen = {name for name in layers if self.chosen(name)}
        parameters = sum(layers[name].weight.numel() for name in chosen)
        name, options = _CONFIGS[self.type]
        config = getattr(torchao.quantization, name)(**options)
        torchao.quantization.quantize_(module, config, filter_fn=lambda _part, path: path in chosen)
        module.requires_grad_(False)
        return [f"{len(chosen)} linear layers, {parameters} weights to {self.type.partition('_')[0]}"] if chosen else []
