"""Quantize the linear layers of a component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkiln.errors import Incompatible, MissingDependency, Problem
from diffkiln.interpreter.layers import Stored, matching
from diffkiln.passes.base import Fact, ModelPass, Restored, State
from diffkiln.passes.quantizers import Layers, Quantizer, Settings, quantizer
from diffkiln.spec import Conflict, Target, refuse

Backend = Literal["torchao", "bitsandbytes", "quanto"]
Type = Literal[
    "int8_weight_only", "int8_dynamic", "int4_weight_only", "float8_weight_only", "float8_dynamic", "int8", "nf4", "fp4"
]
_OPTIONAL = ("group_size", "granularity", "double_quant")


class Quantize(ModelPass):
    """Quantize the linear layers of a component; norms, convolutions and embeddings stay as they are.

    So does a layer that shares its weight, as a head with the embedding: what is shared would be stored a second time;
    and one that the type cannot hold, which the notes count.

    Types of torchao: `int8_weight_only`: int8 weights with one scale a row, symmetric, activations untouched.
    `int8_dynamic`: the same weights, activations quantized to int8 as they come, one scale a token.
    `int4_weight_only`: two weights in a byte with one scale for each `group_size` columns. `float8_weight_only`:
    float8 (e4m3) weights with one scale a row. `float8_dynamic`: float8 weights and activations.
    Types of bitsandbytes: `int8`, one scale a row; `nf4` and `fp4`, 4-bit with one scale for 64 weights.
    Type of quanto: `int8`, one scale a row.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "quantize the linear layers of a component"
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

    backend: Backend = Field("torchao", description="Library that quantizes.")
    type: Type = Field(description="Type of the quantized weights; `dynamic` types quantize activations too.")
    include: tuple[str, ...] = Field(("*",), description="Patterns of the linear layers to quantize.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the linear layers to leave unchanged.")
    group_size: Annotated[int, Field(ge=16, le=1024, multiple_of=2)] = Field(
        64, description="For int4_weight_only: number of columns that share one scale."
    )
    granularity: Literal["per_row", "per_tensor"] = Field(
        "per_row", description="For float8_dynamic: one scale for each row and each token, or one for the whole tensor."
    )
    double_quant: bool = Field(False, description="For nf4 and fp4: quantize the scales too.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        backend, kind = given.get("backend", "torchao"), given.get("type")
        known = quantizer(backend).options if backend in ("torchao", "bitsandbytes", "quanto") else None
        if known is None or not isinstance(kind, str):
            return
        if kind not in known:
            others = [name for name in ("torchao", "bitsandbytes", "quanto") if kind in quantizer(name).options]
            if others:
                mend = f'Set "backend": "{others[0]}", or choose one of {", ".join(known)}'
                yield ("type",), refuse(f"{kind} is no type of {backend}", mend)
            return
        for name in _OPTIONAL:
            if name in given and name not in known[kind]:
                yield (name,), refuse(f"says nothing about {kind}", "Remove it")

    @property
    def quantizer(self) -> Quantizer:
        return quantizer(self.backend)

    @property
    def settings(self) -> Settings:
        return Settings(self.type, self.group_size, self.granularity, self.double_quant)

    def options(self) -> dict[str, Any]:
        """The options as JSON, without those that say nothing about the type."""
        used = self.quantizer.options[self.type]
        written = self.model_dump(mode="json")
        return {key: value for key, value in written.items() if key not in _OPTIONAL or key in used}

    def provides(self) -> Iterable[Fact]:
        yield Fact("quantized", self.component, self.name)
        if self.quantizer.compiles:
            yield Fact(f"quantized_by_{self.backend}", self.component, self.name)
        if self.type == "float8_dynamic" and self.granularity == "per_tensor":
            yield Fact("scaled_together", self.component, self.name)

    def check_module(self, module: torch.nn.Module, plan: State, target: Target, where: str) -> Iterable[Problem]:
        if missing := self.quantizer.missing():
            extra = self.quantizer.extra
            yield Problem(f"{where}.backend", missing, f"pip install 'diffkiln[{extra}]'")
        layers = linear_layers(module)
        for reason, mend in self.quantizer.objections(self.settings, target, self._chosen(layers)):
            yield Problem(f"{where}.type", reason, mend)
        yield from self._useless_patterns(module, layers, where)
        if not self._chosen(layers):
            unfit = any(self.chosen(name) for name in layers)
            why = f": {self.type} does not hold their shapes" if unfit else ""
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
                mend = f'Did you mean "{pattern}.*"?' if inside else ""
                reason = f"the pattern {pattern!r} matches no layer of {self.component}"
                taken = [name for name, part in module.named_modules() if is_quantized(part)]
                if any(fnmatchcase(name, pattern) for name in taken):
                    reason = f"the layers that {pattern!r} matches are quantized already, by an earlier quantize"
                yield Problem(f"{where}.{field}[{index}]", reason, mend)

    def chosen(self, name: str) -> bool:
        """Whether the linear layer of this name is to be quantized."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _chosen(self, layers: Layers) -> dict[str, torch.nn.Linear]:
        fits, settings = self.quantizer.fits, self.settings
        return {name: layer for name, layer in layers.items() if self.chosen(name) and fits(layer, settings)}

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        layers = linear_layers(module)
        chosen = self._chosen(layers)
        notes = list(self._notes(layers, chosen))
        self.quantizer.quantize(module, chosen, self.settings)
        module.requires_grad_(False)
        return notes if chosen else []

    @classmethod
    def check_restore(cls, options: Mapping[str, Any], bundle: Restored) -> None:
        if options["backend"] == "torchao" and bundle.to_disk:
            raise Incompatible(
                f"diffusers cannot offload torchao weights to disk, and {options['component']} has them. Load the "
                "bundle without as_diffusers, or compile it without offloading"
            )

    @classmethod
    def restore_weight(
        cls, layer: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> torch.Tensor | None:
        chosen = matching([layer], options["include"]) and not matching([layer], options["exclude"])
        if not chosen or options["backend"] != "torchao":
            return None
        try:
            from diffkiln.interpreter.layers import torchao
        except ImportError:
            raise MissingDependency("this bundle's weights are torchao's in diffusers: pip install torchao") from None
        kind, granularity = str(options["type"]), str(options.get("granularity", "per_row"))
        if kind not in torchao.TYPES:
            raise Incompatible(f"weights of the type {kind!r} cannot be put into diffusers by this diffkiln")
        return torchao.joined(weight, parts, kind, granularity)

    def _notes(self, layers: Layers, chosen: Layers) -> Iterator[str]:
        """What is quantized, and what each pattern touches."""
        yield f"{len(chosen)} linear layers, {_weights(chosen)} weights to {self.type.partition('_')[0]}"
        unfit = {name: layer for name, layer in layers.items() if self.chosen(name) and name not in chosen}
        if unfit:
            yield f"{len(unfit)} linear layers, {_weights(unfit)} weights stay: {self.type} does not hold their shapes"
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns if patterns != ("*",) else ():
                touched = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
                yield f"{field} {pattern}: {len(touched)} linear layers, {_weights(touched)} weights"


def _weights(layers: Layers) -> int:
    return sum(layer.weight.numel() for layer in layers.values())


def is_quantized(part: torch.nn.Module) -> bool:
    """Whether a layer's weight is no plain tensor any more."""
    weight = part._parameters.get("weight")
    if weight is None:
        return isinstance(part, Stored)
    return is_traceable_wrapper_subclass(weight)


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers with plain weights that they own, by name."""
    owners = Counter(id(weight) for part in module.modules() for weight in part._parameters.values())
    linear = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    plain = {name: part for name, part in linear.items() if not is_quantized(part)}
    return {name: part for name, part in plain.items() if owners[id(part.weight)] == 1}


PLUGIN = Quantize
