"""From a file to an adapter: every tensor is matched with a layer of the bundle, or the file is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from diffkiln.errors import CallError
from diffkiln.guards.limits import active
from diffkiln.interpreter.adapters import Kind, Named, other_method, parse
from diffkiln.runtime.adapters.adding import Change, rounds
from diffkiln.runtime.adapters.file import DORA, AdapterFile, Alphas, open_file
from diffkiln.runtime.adapters.targets import INT8, OTHER, Layers, Target
from diffkiln.runtime.tables import Entry

_CONVERT = "diffkiln lora convert FILE --for BUNDLE -o FILE reads more formats"


@dataclass(frozen=True)
class Adapter:
    """The changes that one adapter makes.

    Attributes:
        file: Its name, for messages.
        changes: One for each layer.
        slots: Whether they are for slots.
    """

    file: str
    changes: tuple[Change, ...]
    slots: bool = False

    @property
    def layers(self) -> set[str]:
        """Returns the names of the layers that it changes, with those of their components before them."""
        return {change.target.path for change in self.changes}

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its factors."""
        return sum(change.nbytes for change in self.changes)


@dataclass(frozen=True)
class Wanted:
    """The way in which a file is to be read.

    Attributes:
        components: Names of the pipeline's components that have weights.
        denoiser: The component of layers whose names say none.
        ignored: Patterns of names of tensors that are left out on purpose.
        requantize: Whether sums may be rounded to quantized types.
        slots: Whether it is for layers' slots, and not to be added to their weights.
    """

    components: Collection[str]
    denoiser: str
    ignored: Sequence[str] = ()
    requantize: bool = False
    slots: bool = False

    def ignores(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.ignored)


@dataclass
class _Layer:
    """The tensors of one layer: kind → name in the file."""

    named: Named
    keys: dict[Kind, str] = field(default_factory=dict)


def read_adapter(path: Path, wanted: Wanted, layers_of: Callable[[str], Layers], device: torch.device) -> Adapter:
    """Reads an adapter whose tensors have the names that diffusers, PEFT or kohya's scripts give them.

    Args:
        path: A safetensors file.
        wanted: How to read it.
        layers_of: Gives the layers of a component.
        device: Where the factors are to be.

    Raises:
        CallError: The file is no adapter of this bundle's model; says why and what to do.
        LimitExceeded: It has more bytes, or a higher rank, than the limits allow.
    """
    file = open_file(path)
    try:
        found = [_target_of(file, row, wanted, layers_of) for row in _layers(file, wanted)]
        unknown = [row for row, target in found if target is None]
        if unknown:
            raise _unknown(file, unknown, len(found))
        plans = [_checked(file, row, target, wanted) for row, target in found if target is not None]
        if not plans:
            raise CallError(f"load_lora: {file.name} holds no factors of a LoRA. {_CONVERT}")
        tensors = file.tensors()
    finally:
        file.close()
    alphas = Alphas(file.metadata, file.name)
    changes = tuple(_change(row, target, tensors, alphas, device) for row, target in plans)
    return Adapter(file.name, changes, wanted.slots)


def _layers(file: AdapterFile, wanted: Wanted) -> list[_Layer]:
    """Returns the layers that a file names, each with its tensors."""
    found: dict[tuple[str, str], _Layer] = {}
    strange: list[str] = []
    for key in sorted(file.entries):
        if wanted.ignores(key):
            continue
        named = parse(key, wanted.components)
        if named is None:
            strange.append(key)
            continue
        row = found.setdefault((named.owner, named.layer), _Layer(named))
        if named.kind in row.keys:
            raise CallError(
                f"load_lora: {file.name} names one layer twice: {row.keys[named.kind]} and {key}. Leave one out: "
                f'ignore=["{key}"]'
            )
        row.keys[named.kind] = key
    if strange:
        raise _strange(file, strange)
    return list(found.values())


def _strange(file: AdapterFile, keys: Sequence[str]) -> CallError:
    """Returns the error for tensors whose names are in no format that is read here."""
    what = f"load_lora: {len(keys)} of the {len(file.entries)} tensors of {file.name}"
    if method := next((method for key in keys if (method := other_method(key))), ""):
        hint = DORA if method == "DoRA" else "Merge them into the model before you compile it"
        return CallError(f"{what}, such as {keys[0]}, are of {method}, which is not LoRA's sum. {hint}")
    return CallError(
        f"{what} have names that are not LoRA's in diffusers or PEFT, such as {keys[0]}. {_CONVERT}; or leave them "
        'out: ignore=["PATTERN"]'
    )


def _target_of(
    file: AdapterFile, row: _Layer, wanted: Wanted, layers_of: Callable[[str], Layers]
) -> tuple[_Layer, Target | None]:
    component = row.named.owner or wanted.denoiser
    if component not in wanted.components:
        key = next(iter(row.keys.values()))
        raise CallError(
            f"load_lora: {file.name} changes {component}, such as {key}, which the bundle does not have. Leave it out: "
            f'ignore=["{key.partition(".")[0]}*"]'
        )
    return row, layers_of(component).find(row.named.layer, row.named.underscored)


def _unknown(file: AdapterFile, rows: Sequence[_Layer], total: int) -> CallError:
    """Returns the error for layers that the bundle does not have."""
    shown = ", ".join(row.named.layer for row in rows[:3])
    what = f"load_lora: {len(rows)} of the {total} layers that {file.name} changes are not in the bundle: {shown}"
    what += ", …" if len(rows) > 3 else ""
    if len(rows) * 2 > total:
        return CallError(f"{what}. It was made for another architecture, or names layers in another way: {_CONVERT}")
    return CallError(
        f"{what}. Passes removed them, or the file is for a variant of the model. Compile without those passes, add "
        'the adapter by the pass fuse_lora, or leave them out: ignore=["PATTERN"]'
    )


def _checked(file: AdapterFile, row: _Layer, target: Target, wanted: Wanted) -> tuple[_Layer, Target]:
    """Checks the shapes of a layer's factors, and the form of its weight, before anything is read."""
    down, up = (file.entries.get(row.keys.get(kind, "")) for kind in ("down", "up"))
    if down is None or up is None:
        key = next(iter(row.keys.values()))
        raise CallError(
            f"load_lora: {file.name} has one of the two factors of {row.named.layer}, as {key}. The file is not whole: "
            "get it again"
        )
    target = target.within(math.prod(_trimmed(down.shape[1:])))
    rank = up.shape[1] if len(up.shape) >= 2 else 0
    active().check("adapter_rank", max(rank, down.shape[0] if down.shape else 0), f"{file.name}, {row.named.layer}")
    if wanted.slots and target.used:
        _check_room(file, row, target, up)
    elif not wanted.slots:
        _check_form(file, row, target, wanted)
    if reason := _misfit(file, row, target, down, up):
        raise CallError(
            f"load_lora: {file.name}: {row.named.layer} {reason}. It was made for another architecture. Give an "
            "adapter that was trained on this model"
        )
    return row, target


def _misfit(file: AdapterFile, row: _Layer, target: Target, down: Entry, up: Entry) -> str:
    """Returns how the factors of a layer do not fit its weight; empty if they do."""
    inputs, outputs = _trimmed(down.shape[1:]), up.shape[0] if up.shape else 0
    if len(up.shape) < 2 or math.prod(up.shape[2:]) != 1 or not down.shape or up.shape[1] != down.shape[0]:
        return f"has factors {list(up.shape)} and {list(down.shape)}, which cannot be multiplied"
    rows = target.rows(outputs)
    own = target.shape[1:]
    if up.shape[1] < 1 or len(target.shape) < 2 or inputs != _trimmed(own) or rows is None:
        return f"would change {outputs} rows of {list(inputs)}, and the bundle's weight is {list(target.shape)}"
    bias, alpha = (file.entries.get(row.keys.get(kind, "")) for kind in ("bias", "alpha"))
    if bias is not None and (not target.bias or bias.shape != (outputs,)):
        return f"adds {list(bias.shape)} to a bias that the bundle does not have in that shape"
    if alpha is not None and math.prod(alpha.shape) != 1:
        return f"has an alpha of the shape {list(alpha.shape)}, which is no number"
    return ""


def _check_room(file: AdapterFile, row: _Layer, target: Target, up: Entry) -> None:
    """Checks that a layer has slots, and that the adapter fits into one."""
    room, outputs, rank = target.room, up.shape[0], up.shape[1] if len(up.shape) > 1 else 0
    if room is None or (target.part is not None and outputs * room.parts != target.shape[0]):
        raise CallError(
            f"load_lora: {row.named.layer} of {target.component}, which {file.name} changes, has no slots. "
            "merged=True adds the whole adapter to the weights; or leave such layers out: ignore=[…]"
        )
    if rank > room.rank:
        raise CallError(
            f"load_lora: {file.name} has the rank {rank}, of {row.named.layer}, and the bundle's slots have "
            f'{room.rank}. Compile it with "runtime": {{"adapters": {{"rank": {rank}}}}}, or add the adapter to the '
            "weights: merged=True"
        )
    if "bias" in row.keys:
        raise CallError(
            f"load_lora: {file.name} adds to the bias of {row.named.layer}, for which slots have no room. merged=True "
            "adds the whole adapter to the weights"
        )


def _check_form(file: AdapterFile, row: _Layer, target: Target, wanted: Wanted) -> None:
    if target.form == OTHER:
        raise CallError(
            f"load_lora: {row.named.layer} is quantized, or stored in another way, to which {file.name} cannot be "
            'added. Compile the bundle with slots, "runtime": {"adapters": {"rank": 16, "slots": 2}}; without that for '
            "these layers (exclude); or add the adapter by the pass fuse_lora before it"
        )
    if rounds(target) and not wanted.requantize:
        raise CallError(
            f"load_lora: {row.named.layer} is stored as {target.form}. requantize=True adds {file.name} in float32 and "
            f"rounds the sum again: numbers move by up to half a step, {_step(target)}, and what is finer is lost. "
            'Or compile with slots, "runtime": {"adapters": {"rank": 16, "slots": 2}}, which round nothing; or these '
            "layers unquantized"
        )


def _step(target: Target) -> str:
    """Returns how far a number moves when a sum is rounded to a quantized type."""
    if target.storage is not None:
        return target.storage.step
    return "1/254 of the largest of its row" if target.form == INT8 else "1/16 of each number"


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape without the ones at its end: a convolution of one pixel is a linear layer."""
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])


def _change(
    row: _Layer, target: Target, tensors: Mapping[str, torch.Tensor], alphas: Alphas, device: torch.device
) -> Change:
    down, up = tensors[row.keys["down"]], tensors[row.keys["up"]]
    rank, outputs = down.shape[0], up.shape[0]
    rows = target.rows(outputs) or slice(0, 0)
    alpha = tensors[row.keys["alpha"]].item() / rank if "alpha" in row.keys else None
    factor = alphas.factor(target.component, row.named.layer, rank) if alpha is None else alpha
    bias = tensors[row.keys["bias"]].to(device) if "bias" in row.keys else None
    return Change(target, rows, down.reshape(rank, -1).to(device), up.reshape(outputs, rank).to(device), bias, factor)
