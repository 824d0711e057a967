"""Store the weights of layers in float8 and compute in the type that they had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import Cast, store
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.passes.layers import is_quantized
from diffkiln.spec import Target
from diffkiln.spec.expressions import Expressions


class LayerwiseCast(ModelPass):
    """Store the weights of linear layers, convolutions and embeddings in float8, and cast them when they are used.

    It does the same as diffusers' `enable_layerwise_casting`, to the same layers. Norms, patch and position embeddings,
    and layers that a model declares to need their precision, stay as they are. There is no scale, so small weights lose
    more than with `quantize` and float8_weight_only.
    """

    name: ClassVar[str] = "layerwise_cast"
    summary: ClassVar[str] = "store weights in float8 and compute in their original type"
    after: ClassVar = {"quantize": "layerwise_cast takes the layers that quantize leaves"}
    requires_not: ClassVar = {
        "sparse": "sparsify has stored the weights as half of their values. Choose one of the two",
        "gguf": "a GGUF file has quantized weights already. Give the original weights, or leave them as they are",
    }
    examples: ClassVar = ({"name": "layerwise_cast", "component": "transformer", "storage": "float8_e4m3fn"},)

    storage: Literal["float8_e4m3fn", "float8_e5m2"] = Field(
        "float8_e4m3fn", description="Type to store the weights in."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Regular expressions, as in diffusers, of further layers to leave unchanged."
    )

    def provides(self) -> Iterable[Fact]:
        return [Fact("stored_smaller", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        for index, pattern in enumerate(self.exclude):
            try:
                expressions = Expressions([pattern])
                found = any(expressions.found_in(name) for name, _ in module.named_modules())
            except ValueError as error:
                yield Problem(f"{where}.exclude[{index}]", f"{pattern!r} is not a regular expression: {error}")
                return
            if not found:
                reason = f"the expression {pattern!r} matches no layer of {self.component}"
                yield Problem(f"{where}.exclude[{index}]", reason)
        if not self._layers(module):
            taken = any(is_quantized(part) for part in module.modules())
            why = ", since quantize has taken them all" if taken else ""
            yield Problem(where, f"layerwise_cast finds no layer of {self.component} to store in a smaller type{why}")

    def _layers(self, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Returns the layers that diffusers chooses: supported ones that no skipped name leads to."""
        from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS as SUPPORTED
        from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

        skipped = [*DEFAULT_SKIP_MODULES_PATTERN, *self.exclude]
        skipped += getattr(module, "_keep_in_fp32_modules", None) or ()
        skipped += getattr(module, "_skip_layerwise_casting_patterns", None) or ()
        expressions = Expressions(skipped)
        owners: dict[int, int] = {}
        for part in module.modules():
            for tensor in part._parameters.values():
                owners[id(tensor)] = owners.get(id(tensor), 0) + 1
        found: dict[str, torch.nn.Module] = {}

        def walk(part: torch.nn.Module, name: str) -> None:
            if expressions.found_in(name):
                return
            if isinstance(part, SUPPORTED):
                weight = part._parameters.get("weight")
                if weight is None or is_quantized(part) or owners[id(weight)] > 1:
                    return
                if weight.is_floating_point() and weight.itemsize > 1:
                    found[name] = part
                return
            for child, inner in part.named_children():
                walk(inner, f"{name}.{child}" if name else child)

        walk(module, "")
        return found

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        layers = self._layers(module)
        count = 0
        for layer in layers.values():
            tensors = {name: t for name in Cast.stores if (t := layer._parameters.get(name)) is not None}
            dtype = getattr(torch, self.storage)
            count += sum(tensor.numel() for tensor in tensors.values())
            parts = {f"{name}_data": tensor.detach().to(dtype) for name, tensor in tensors.items()}
            store(layer, Cast(self.storage), parts)
        return [f"{len(layers)} layers, {count} weights to {self.storage}"] if layers else []


PLUGIN = LayerwiseCast
