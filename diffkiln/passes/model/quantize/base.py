"""What every type of quantization is: patterns that choose linear layers, and the change of one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, ModelPass, Pass, State
from diffkiln.passes.layers import Layers, is_quantized, linear_layers
from diffkiln.passes.variants import Variant, constant
from diffkiln.spec import Target

BACKEND = "Library that quantizes."
TYPE = "Type of the quantized weights; `dynamic` types quantize activations too."


class Quantize(Variant, ModelPass):
    """Quantize the linear layers of a component; norms, convolutions and embeddings stay as they are.

    A layer that shares its weight, as a head does with the embedding, also stays: the shared weight would be stored a
    second time. So does a layer that the type cannot hold; the notes count these.

    Class attributes: `package`, the module that is imported; `extra`, what installs it with diffkiln; `uncompiled`, why
    no engine can hold the layers, empty if one can.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "quantize the linear layers of a component"
    discriminators: ClassVar = ("backend", "type")
    repeats: ClassVar[bool] = True
    maps: ClassVar[bool] = True
    requires_not: ClassVar = {
        "sparse": "sparsify has stored the weights as half of their values. Quantize them, or make them sparse",
        "stored_smaller": "layerwise_cast has stored the weights in a smaller type. Choose one of the two",
        "gguf": "a GGUF file has quantized weights already. Give the original weights, or do not quantize",
    }
    examples: ClassVar = (
        {"name": "quantize", "component": "transformer", "type": "int8_weight_only", "exclude": ["*norm*"]},
        {
            "name": "quantize",
            "mapping": {
                "transformer": {"type": "float8_dynamic", "granularity": "per_tensor"},
                "text_encoder_2": {"backend": "bitsandbytes", "type": "nf4", "double_quant": True},
            },
        },
    )

    package: ClassVar[str]
    extra: ClassVar[str]
    uncompiled: ClassVar[str] = ""

    include: tuple[str, ...] = Field(("*",), description="Patterns of the linear layers to quantize.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the linear layers to leave unchanged.")

    @classmethod
    def misfit(cls, field: str, options: Mapping[str, Any], left: Sequence[type[Pass]], where: str) -> Problem:
        wanted, models = options.get("type"), cls.variants().values()
        others = [constant(model, "backend") for model in models if constant(model, "type") == wanted]
        if field != "type" or not others:
            return super().misfit(field, options, left, where)
        backend, known = constant(left[0], "backend"), ", ".join(constant(model, "type") for model in left)
        hint = f'Set "backend": "{others[0]}", or choose one of {known}'
        return Problem(f"{where}.type", f"{wanted} is not a type of {backend}", hint)

    # -- what each type says --

    def objections(self, target: Target, layers: Layers) -> Iterable[tuple[str, str]]:
        """Returns what the target or the layers lack for the type: reason, hint."""
        return ()

    def fits(self, layer: torch.nn.Linear) -> bool:
        """Returns True if the type can hold the layer's weight; other layers stay as they are."""
        return True

    @abstractmethod
    def quantize(self, layer: torch.nn.Linear) -> None:
        """Quantizes a layer in place, a meta model as well as a real one."""

    # -- what all have in common --

    @property
    def _kind(self) -> str:
        return constant(type(self), "type")

    def provides(self) -> Iterable[Fact]:
        yield Fact("quantized", self.component, self.name)
        if self.uncompiled:
            name = f"quantized_by_{constant(type(self), 'backend')}"
            yield Fact(name, self.component, self.name, "uncompilable", self.uncompiled)

    @classmethod
    def missing(cls) -> str:
        """Returns the reason why the library cannot be used here; empty if it can."""
        try:
            found = find_spec(cls.package)
        except ModuleNotFoundError:  # of a package that holds it
            found = None
        return "" if found else f"{cls.package} is not installed"

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if missing := self.missing():
            yield Problem(f"{where}.backend", missing, f"pip install 'diffkiln[{self.extra}]'")
        layers = linear_layers(module)
        for reason, hint in self.objections(target, self._chosen(layers)):
            yield Problem(f"{where}.type", reason, hint)
        yield from self._useless_patterns(module, layers, where)
        if not self._chosen(layers):
            unfit = any(self.chosen(name) for name in layers)
            why = f": {self._kind} does not hold their shapes" if unfit else ""
            yield Problem(where, f"no linear layer of {self.component} is left to quantize{why}")

    def _useless_patterns(self, module: torch.nn.Module, layers: Layers, where: str) -> Iterator[Problem]:
        everything = [name for name, _ in module.named_modules()]
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for index, pattern in enumerate(patterns):
                # What is no linear layer, such as a norm, may be excluded too; what holds some would not exclude them.
                harmless = field == "exclude" and any(fnmatchcase(name, pattern) for name in everything)
                inside = any(fnmatchcase(name, f"{pattern}.*") for name in layers)
                if any(fnmatchcase(name, pattern) for name in layers) or (harmless and not inside):
                    continue
                hint = f'Did you mean "{pattern}.*"?' if inside else ""
                reason = f"the pattern {pattern!r} matches no layer of {self.component}"
                taken = [name for name, part in module.named_modules() if is_quantized(part)]
                if any(fnmatchcase(name, pattern) for name in taken):
                    reason = f"the layers that {pattern!r} matches are quantized already, by an earlier quantize"
                yield Problem(f"{where}.{field}[{index}]", reason, hint)

    def chosen(self, name: str) -> bool:
        """Returns True if the linear layer of this name is to be quantized."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _chosen(self, layers: Layers) -> dict[str, torch.nn.Linear]:
        return {name: layer for name, layer in layers.items() if self.chosen(name) and self.fits(layer)}

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        layers = linear_layers(module)
        chosen = self._chosen(layers)
        notes = list(self._notes(layers, chosen))
        for layer in chosen.values():
            self.quantize(layer)
        module.requires_grad_(False)
        return notes if chosen else []

    def _notes(self, layers: Layers, chosen: Layers) -> Iterator[str]:
        """Yields notes on what is quantized, and on what each pattern touches."""
        yield f"{len(chosen)} linear layers, {_weights(chosen)} weights to {self._kind.partition('_')[0]}"
        unfit = {name: layer for name, layer in layers.items() if self.chosen(name) and name not in chosen}
        if unfit:
            yield f"{len(unfit)} linear layers, {_weights(unfit)} weights stay: {self._kind} does not hold their shapes"
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns if patterns != ("*",) else ():
                touched = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
                yield f"{field} {pattern}: {len(touched)} linear layers, {_weights(touched)} weights"


def _weights(layers: Layers) -> int:
    return sum(layer.weight.numel() for layer in layers.values())
