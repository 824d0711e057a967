"""The layers of the original model, and where each is among a bundle's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffkiln.bundle import Verified
from diffkiln.bundle.layout import LAYERS, PIPELINE, UNUSED
from diffkiln.errors import ManifestInvalid
from diffkiln.interpreter.layers import FUSED, Cast, FourBit, Int4, Int8, StorageFormat, first_row
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP
from diffkiln.program import Module
from diffkiln.program.narrowed import full
from diffkiln.runtime.tables import Entry, read_header

#: How a weight is stored: as it is used; as float8; as int8 with a scale a row, in the form of diffkiln or of torchao;
#: in four bits, in a form of diffkiln; or in a form to which nothing can be added.
PLAIN, FLOAT8, INT8, FOUR_BITS, OTHER = "plain", "float8", "int8", "4 bits", "other"
_STORED = {Cast.name: FLOAT8, Int8.name: INT8}


#: Layer → the name of the form in which it is stored, and the form's options.
Forms = Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Room:
    """The slots of a layer: in how many parts, how many, of which rank, and for how many rows of a batch."""

    parts: int
    slots: int
    rank: int
    rows: int


@dataclass(frozen=True)
class Target:
    """A layer of the original model.

    Attributes:
        component: Of the pipeline.
        layer: Its name in the bundle; of the fused layer, where it was fused.
        form: How its weight is stored: one of the constants of this module.
        weight: Name of the tensor that holds the weight, or the numbers of a quantized one.
        shape: Of that tensor.
        scale: Name of the scales of a quantized weight; empty without any.
        bias: Name of the bias; empty without one.
        part: Which rows of a fused layer it is, as (index, number of parts); None for all rows.
        used: Whether a program reads it.
        storage: The form of a weight in four bits.
        room: Its slots; None where it has none that every program reads which reads the layer.
    """

    component: str
    layer: str
    form: str
    weight: str
    shape: tuple[int, ...]
    scale: str = ""
    bias: str = ""
    part: tuple[int, int] | None = None
    used: bool = True
    storage: StorageFormat | None = None
    room: Room | None = None

    @property
    def path(self) -> str:
        """Returns the layer's name, with that of its component before it."""
        return f"{self.component}.{self.layer}"

    def within(self, inputs: int) -> Target:
        """Returns the target of a weight whose shape is known once its inputs are, as its numbers lie in one row."""
        count = self.shape[0] if len(self.shape) == 1 else 0
        return self if not count or not inputs or count % inputs else replace(self, shape=(count // inputs, inputs))

    def rows(self, count: int) -> slice | None:
        """Returns the rows of the weight that a layer with so many outputs has; None if it cannot have so many."""
        total = self.shape[0] if self.shape else 0
        if self.part is None:
            return slice(0, total) if count == total else None
        start = first_row(*self.part, count, total)
        return None if start is None else slice(start, start + count)


@dataclass(frozen=True)
class Layers:
    """The layers of one component by the original model's names."""

    component: str
    targets: Mapping[str, Target]
    underscored: Mapping[str, str]

    def find(self, name: str, underscored: bool) -> Target | None:
        """Returns the layer of this name; transformers' text encoders may have `text_model` before it, or not."""
        for each in (name, *_variants(name, "_" if underscored else ".")):
            known = self.underscored.get(each, "") if underscored else each
            if target := self.targets.get(known):
                return target
        return None


def _variants(name: str, dot: str) -> tuple[str, str]:
    prefix = f"text_model{dot}"
    return name.removeprefix(prefix), prefix + name


def read_layers(verified: Verified, component: str) -> Layers:
    """Returns the layers of a component, from the headers of its weights' files.

    Raises:
        ManifestInvalid: A header is malformed.
    """
    used: dict[str, Entry] = {}
    unused: dict[str, Entry] = {}
    for row in verified.manifest.weights[component]:
        entries, _, _ = read_header(verified, row.file)
        (unused if row.name == UNUSED else used).update(entries)
    forms = _forms(verified, component)
    targets: dict[str, Target] = {}
    for entries, is_used in ((unused, False), (used, True)):
        for name in entries:
            if target := _target(component, name, entries, forms):
                bias = f"{target.layer}.bias"
                targets[target.layer] = replace(target, used=is_used, bias=bias if bias in entries else "")
    for layer, room in rooms(used).items():
        targets[layer] = replace(targets[layer], room=room)
    targets = _parts(targets) | targets
    return Layers(component, targets, {name.replace(".", "_"): name for name in targets})


def without_unread(layers: Layers, module: Module | None) -> Layers:
    """Returns the layers with the slots of those alone whose slots every program reads that reads the layer.

    Elsewhere an adapter would do nothing. Programs that compute fewer slots run for calls that use fewer.
    """
    lacking: set[str] = set()
    for name, program in full(module.programs if module is not None else {}).items():
        alone = replace(module, programs={name: program})  # type: ignore[type-var]
        read = {weight for weight, _ in alone.weight_types()}
        used = {weight.rpartition(".")[0].removesuffix(".weight") for weight in read}
        lacking |= {layer for layer in used if f"{layer}.{DOWN}" not in read}
    found = {
        name: replace(target, room=None) if target.layer in lacking else target
        for name, target in layers.targets.items()
    }
    return replace(layers, targets=found)


def rooms(entries: Mapping[str, Entry]) -> dict[str, Room]:
    """Returns the slots of each layer that has some."""
    found: dict[str, Room] = {}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == DOWN and len(entry.shape) == 4 and math.prod(entry.shape):
            up, factors = (entries[key].shape if key in entries else () for key in _beside(layer))
            room = Room(*entry.shape[:3], rows=factors[0] if factors else 0)
            if up[1:] == (room.slots, room.rank) and factors == (room.rows, math.prod(entry.shape[:3])) and room.rows:
                found[layer] = room
    return found


def _beside(layer: str) -> tuple[str, str]:
    return f"{layer}.{UP}", f"{layer}.{FACTORS}"


def _four_bits(form: str, options: Mapping[str, Any]) -> StorageFormat | None:
    """Returns a form in four bits; None for another.

    Raises:
        ManifestInvalid: Its options are not its.
    """
    kind = next((kind for kind in (Int4, FourBit) if kind.name == form), None)
    try:
        return kind(**options) if kind is not None else None
    except TypeError:
        raise ManifestInvalid(f"a bundle's {LAYERS} gives {form} options that it does not have") from None


def _target(component: str, name: str, entries: Mapping[str, Entry], forms: Forms) -> Target | None:
    """Returns the layer whose weight, or the main part of it, this tensor is."""
    entry, (layer, _, leaf) = entries[name], name.rpartition(".")
    shape = entry.used_shape
    if leaf == "weight":
        form = PLAIN if entry.dtype.itemsize > 1 else FLOAT8
        form = form if entry.dtype.is_floating_point else OTHER
        return Target(component, layer, form, name, shape)
    if leaf == "weight_data":
        storage = _four_bits(*forms.get(layer, ("", {})))
        if storage is not None:
            numbers = (*shape[:-1], 2 * shape[-1]) if shape else shape
            return Target(component, layer, FOUR_BITS, name, numbers, storage=storage)
        stored = _STORED.get(forms.get(layer, ("", {}))[0], OTHER)
        return Target(component, layer, stored, name, shape, f"{layer}.weight_scale" if stored == INT8 else "")
    if leaf == "qdata" and layer.endswith(".weight"):
        others = {key for key in entries if key.startswith(f"{layer}.")} - {name}
        simple = others == {f"{layer}.scale"} and str(entry.dtype) == "torch.int8"
        form, scale = (INT8, f"{layer}.scale") if simple else (OTHER, "")
        return Target(component, layer.removesuffix(".weight"), form, name, shape, scale)
    return None


def _parts(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Returns the layers that were fused into others."""
    found: dict[str, Target] = {}
    for layer, target in targets.items():
        home, _, leaf = layer.rpartition(".")
        for index, part in enumerate(FUSED.get(leaf, ())):
            found[f"{home}.{part}" if home else part] = replace(target, part=(index, len(FUSED[leaf])))
    return found


def _forms(verified: Verified, component: str) -> Forms:
    """Returns the form, with its options, in which each layer is stored that is not stored as diffusers stores it."""
    path = f"{PIPELINE}{component}/{LAYERS}"
    if not any(row.path == path for row in verified.files):
        return {}
    try:
        table: Any = json.loads(verified.read(path))
        return {layer: (str(row["form"]), dict(row.get("options", {}))) for layer, row in table.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise ManifestInvalid(f"{path!r} is not a table of layers") from None


def denoiser(components: Collection[str]) -> str:
    """Returns the component that an adapter is for whose names say none."""
    return next((name for name in ("transformer", "unet") if name in components), next(iter(components)))
