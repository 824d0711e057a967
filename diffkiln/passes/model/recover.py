"""Train narrow matrices beside quantized weights, which bring the component back towards the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import LowRank, StorageFormat, Stored, add_factors, matching
from diffkiln.passes.base import Fact, ModelPass, Pass, State
from diffkiln.passes.layers import has_no_data
from diffkiln.program.images import IMAGES
from diffkiln.spec import Spec, Target
from diffkiln.spec.prompts import digest_of, read_prompts

#: Facts of passes that lose what factors regain.
LOSSES = ("quantized", "sparse")

#: Trained factors of each layer by its name: `down` [rank, columns] and `up` [rows, rank].
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

_QUANTIZE = 'Put {"name": "quantize", …} of the same component before it, of a type such as int4_weight_only or nf4.'


class Recover(ModelPass):
    """Train two narrow matrices (LoRA factors) beside each quantized weight, and keep them there.

    The original pipeline draws `pictures` of the prompts, `batch` of them at a time, and keeps what its denoiser is
    given and what it answers. The factors begin as the best approximation of what each weight lost, and are then
    trained for some hundreds of updates: the compressed denoiser is to give the original's answers. The weight is
    computed from the quantized one and the product of its factors, so a layer takes rank × (rows + columns) numbers of
    two bytes more.

    The first variant is drawn. Training goes on where it was killed, and what was trained is kept in the cache, so the
    same spec trains once.
    """

    name: ClassVar[str] = "recover"
    summary: ClassVar[str] = "train factors of low rank that regain what quantization lost"
    after: ClassVar = {
        "sparsify": "it regains what the sparse weights lost",
        "quantize": "it regains what the quantized weights lost",
    }
    requires_not: ClassVar = {"gguf": "a GGUF file has no original weights to come back to. Give the original weights"}
    features: ClassVar = frozenset({LowRank.name})
    examples: ClassVar = ({"name": "recover", "component": "transformer", "prompts": "prompts.txt", "rank": 16},)

    prompts: str = Field(min_length=1, description="Text file, relative to the spec, with one prompt a line.")
    pictures: int = Field(
        64, ge=1, le=100_000, description="Number of pictures that the original draws; the prompts come in turn."
    )
    batch: int = Field(
        8, ge=1, le=1024, description="Number of pictures that are drawn together. An update looks at one call of them."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the first picture's noise and of the training; each further picture has the next."
    )
    rank: int = Field(8, ge=1, description="Number of rows of one factor, and of columns of the other.")
    updates: int = Field(500, ge=1, le=1_000_000, description="Number of updates of the factors.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-3, description="Size of the first updates; it falls to zero as half of a cosine."
    )
    include: tuple[str, ...] = Field(("*",), description="Patterns of the quantized layers that get factors.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the quantized layers that get none.")

    _texts: tuple[str, ...] = PrivateAttr(default=())
    _factors: Factors = PrivateAttr(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Returns the prompts, once the pass is prepared."""
        return self._texts

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        ready = self.model_copy()
        ready._texts = tuple(read_prompts(base / self.prompts))
        return ready

    def trained(self, factors: Factors) -> Recover:
        """Returns the pass with its factors, which are zeros until then."""
        done = self.model_copy()
        done._factors = factors
        return done

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON, with the prompts' digest instead of a local path."""
        written = super().options()
        return written | ({"prompts": digest_of(self._texts), "count": len(self._texts)} if self._texts else {})

    def provides(self) -> Iterable[Fact]:
        return [Fact("recovered", self.component, self.name)]

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        given = [value for variant in spec.variants for value in variant.call.values()]
        if any(variant.call.get(keyword) is not None for variant in spec.variants for keyword in IMAGES):
            yield Problem(where, "recover draws from prompts alone, and the call takes images", "Remove it.")
        elif any(isinstance(value, Mapping) and "shape" in value for value in given):
            yield Problem(where, "recover draws from prompts alone, and the call takes tensors", "Remove it.")
        elif any(variant.fixes_the_prompt for variant in spec.variants):
            yield Problem(
                f"{where}.prompts", "the inputs fix the prompt, and recover draws others", "Remove one of them."
            )

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        compressed = any(fact.component == self.component and fact.name in LOSSES for fact in state.facts if fact.by)
        layers = stored_layers(module) if compressed else {}
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
        elif not layers:
            reason = f"no layer of {self.component} was quantized to a form that factors can stand beside"
            yield Problem(where, f"{reason}, so there is nothing to recover", _QUANTIZE)
        else:
            yield from self._useless_patterns(layers, where)
            yield from self._too_wide(layers, where)

    def _useless_patterns(self, layers: Mapping[str, Stored], where: str) -> Iterable[Problem]:
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for index, pattern in enumerate(patterns):
                if not matching(list(layers), [pattern]):
                    reason = f"the pattern {pattern!r} matches no quantized layer of {self.component}"
                    yield Problem(f"{where}.{field}[{index}]", reason, f"There is {next(iter(layers))}, for example.")
        if not self._chosen(layers):
            yield Problem(where, f"no quantized layer of {self.component} is left to recover", "Exclude fewer.")

    def _too_wide(self, layers: Mapping[str, Stored], where: str) -> Iterable[Problem]:
        shapes = {name: layer.stored["weight"][0] for name, layer in self._chosen(layers).items()}
        narrow = [name for name, shape in shapes.items() if self.rank > min(shape)]
        if narrow:
            first = min(narrow, key=lambda name: min(shapes[name]))
            rows, columns = shapes[first]
            reason = f"the rank {self.rank} is above the size of {len(narrow)} layers, such as {first}"
            hint = f'Give at most {min(rows, columns)}, or leave such layers out: "exclude": ["{first}"].'
            yield Problem(f"{where}.rank", f"{reason} ({rows} × {columns})", hint)

    def _chosen(self, layers: Mapping[str, Stored]) -> dict[str, Stored]:
        left = set(matching(list(layers), self.include)) - set(matching(list(layers), self.exclude))
        return {name: layer for name, layer in layers.items() if name in left}

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        chosen = self._chosen(stored_layers(module))
        for name, layer in chosen.items():
            factors = None if has_no_data(layer._buffers["weight_data"]) else self._factors.get(name)
            add_factors(layer, self.rank, factors)
        count = sum(layer._buffers[f"weight_{part}"].numel() for layer in chosen.values() for part in ("down", "up"))
        return [f"{len(chosen)} layers, {count} numbers in factors of rank {self.rank}"] if chosen else []


def stored_layers(module: torch.nn.Module) -> dict[str, Stored]:
    """Returns the linear layers whose weights are stored in a form that factors can stand beside, by name."""
    linear = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    return {name: part for name, part in linear.items() if isinstance(part, Stored) and _has_room(part.storage)}


def _has_room(storage: StorageFormat) -> bool:
    return storage.stores == ("weight",) and storage.name != LowRank.name


PLUGIN = Recover
