"""Give the linear layers of a denoiser room for adapters, which are put in at run time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from diffkiln.bundle.manifest import ADAPTER_SLOTS
from diffkiln.errors import Problem
from diffkiln.interpreter.layers import can_have_slots, matching, parts_of, put_slots
from diffkiln.interpreter.layers.slots import DOWN, dtype_of
from diffkiln.passes.base import Fact, ModelPass, Pass, State
from diffkiln.passes.narrowing import narrowed
from diffkiln.spec import FEWER, Spec, Target

if TYPE_CHECKING:
    from diffkiln.record.pipeline import Recording

#: A denoiser is called with at most so many copies of the batch: guidance by an image takes three.
COPIES = 4
#: Numbers of adapters for which programs of their own are made where the spec says nothing, and by what factor the
#: products of all slots must then be more.
_FEW, _WORTH = (0, 1), 1.05
_PER_PROMPT = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")


class AddSlots(ModelPass):
    """Give linear layers low-rank inputs: `slots` pairs of narrow matrices each, which adapters are put into.

    A layer then computes the sum of its weight's product and the products of its slots, each times a factor of the
    row. So the rows of a batch may use different adapters, quantized weights stay as they are, and a swap copies the
    adapter's own bytes. The slots are zeros in the bundle. They cost memory, and time in every call that uses them:
    rank × slots × (inputs + outputs) of each layer. `fewer` has programs made for calls that use fewer.

    `"runtime": {"adapters": {"rank": …, "slots": …}}` adds this pass for each denoiser that has none in the list.
    """

    name: ClassVar[str] = "add_slots"
    summary: ClassVar[str] = "give linear layers room for adapters, row by row"
    after: ClassVar = {
        "fuse_lora": "what is fused is a part of the weights",
        "fuse_qkv": "fused projections have slots together",
        "prune": "blocks that are gone need no slots",
        "quantize": "slots stand beside quantized weights",
        "layerwise_cast": "slots stand beside stored weights",
        "sparsify": "slots stand beside sparse weights",
        "recover": "slots stand beside what was recovered",
    }
    features: ClassVar = frozenset({ADAPTER_SLOTS})
    asked_at: ClassVar = "$.runtime.adapters"
    examples: ClassVar = ({"name": "add_slots", "component": "transformer", "rank": 16, "slots": 2},)

    rank: int = Field(16, ge=1, le=1024, description="Highest rank of an adapter; those of a lower one fit too.")
    slots: int = Field(2, ge=1, le=64, description="Number of adapters that one call may use.")
    rows: int = Field(
        8, ge=1, le=4096, description="Most rows of the denoiser's batch, with its copies for guidance counted."
    )
    fewer: tuple[Annotated[int, Field(ge=0, le=63)], ...] | None = Field(None, description=FEWER)
    include: tuple[str, ...] = Field(("*",), description="Patterns of the layers that get slots.")
    exclude: tuple[str, ...] = Field((), description="Patterns of the layers that get none.")

    @classmethod
    def implied(cls, spec: Spec, state: State) -> Iterator[Pass]:
        """Yields the passes that the spec's runtime asks for, one for each denoiser."""
        asked = spec.runtime.adapters
        rows = COPIES * max(map(_batch, state.variants))
        for component in state.denoisers if asked is not None else ():
            yield cls(component=component, rows=rows, **asked.model_dump())  # type: ignore[union-attr]

    def provides(self) -> Iterable[Fact]:
        return [Fact("slotted", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        layers = _layers(module)
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
            return
        if not layers:
            reason = f"{type(module).__name__} has no linear layer, so no adapter could have a slot in it"
            yield Problem(where, reason, "Remove it: load_lora adds adapters to the weights.")
            return
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for index, pattern in enumerate(patterns):
                if not matching(list(layers), [pattern]):
                    reason = f"the pattern {pattern!r} matches no linear layer of {self.component}"
                    yield Problem(f"{where}.{field}[{index}]", reason, f"There is {next(iter(layers))}, for example.")
        if not self._chosen(module):
            yield Problem(where, f"no layer of {self.component} is left to get slots", "Exclude fewer.")
        if (batch := max(map(_batch, state.variants))) > self.rows:
            yield Problem(f"{where}.rows", f"a batch has {batch} rows", f"Give {COPIES * batch} or more.")

    def _chosen(self, module: torch.nn.Module) -> list[str]:
        names = list(_layers(module))
        left = set(matching(names, self.include)) - set(matching(names, self.exclude))
        return [name for name in names if name in left]

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        chosen = self._chosen(module)
        size = sum(self._bytes(name, module.get_submodule(name)) for name in chosen)
        put_slots(module, chosen, self.rank, self.slots, self.rows)
        each = f"{self.slots} slots of rank {self.rank}"
        return [f"{len(chosen)} layers with {each}: {size} bytes, zeros in the bundle's files"] if chosen else []

    def _bytes(self, name: str, layer: Any) -> int:
        parts = parts_of(name)
        numbers = self.rank * self.slots * (parts * (layer.in_features + self.rows) + layer.out_features)
        return numbers * dtype_of(layer).itemsize

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        with_slots, without = _read(recording, self.component)
        if without and not with_slots:
            reason = f"the programs read no slot: {self.component} has more rows than {self.rows}, or they are no batch"
            yield Problem(f"{where}.rows", reason, "Give more rows, or remove the pass.")

    def complete(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """Returns the recording with call programs for fewer adapters. A network that needs all slots has none."""
        notes = []
        wanted, worth = (_FEW, _WORTH) if self.fewer is None else (self.fewer, 1.0)
        for count in sorted({count for count in wanted if count < self.slots}):
            try:
                recording = narrowed(recording, self.component, count, worth)
            except ValueError as error:
                notes.append(f"calls with {count} adapters compute all slots: {error}")
        return recording, notes

    def notices(self, recording: Recording, compiled: Collection[str]) -> Iterable[str]:
        _, without = _read(recording, self.component)
        if without:
            yield (
                f"{len(without)} layers of {self.component} have no slots, such as {min(without)}: their rows are not "
                "those of the batch, or they were computed ahead. Adapters that change them need merged=True"
            )


def _layers(module: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
    return {name: layer for name, layer in module.named_modules() if can_have_slots(name, layer)}


def _batch(variant: Mapping[str, Any]) -> int:
    count = 1
    for name in _PER_PROMPT:
        count *= int(variant.get(name) or 1)
    return count


def _read(recording: Recording, component: str) -> tuple[set[str], set[str]]:
    """Returns the layers with slots that programs read, and those of which they read the weight alone."""
    module = recording.modules.get(component)
    names = {name for name, _ in module.weight_types()} if module is not None else set()
    of_slots = {name.rpartition(".")[0] for name in names if name.endswith(f".{DOWN}")}
    held = recording.pipe.components.get(component) if recording.pipe is not None else None
    slotted = {name for name, part in held.named_modules() if DOWN in part._buffers} if held is not None else set()
    read = {name.rpartition(".")[0].removesuffix(".weight") for name in names}
    return of_slots, (slotted & read) - of_slots


PLUGIN = AddSlots
