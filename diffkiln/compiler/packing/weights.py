"""`weights/`: what the passes left."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch

from diffkiln.bundle import BundleWriter, GroupEntry
from diffkiln.bundle.layout import CHANNELS_LAST, REST, UNUSED, before_loop, weights_file
from diffkiln.compiler.packed import Packed
from diffkiln.compiler.packing.uses import Uses
from diffkiln.errors import PassError
from diffkiln.interpreter.layers import is_channels_last, repeated_blocks
from diffkiln.models.weights import weights_of
from diffkiln.spec import Offload


class WeightsPacker:
    """The writer of `weights/<component>/`: a file for each group of blocks, one for the rest, one for unread weights.

    It is given modules in which some weights have data, and writes a file once all its weights have come. Every weight
    comes once.
    """

    def __init__(self, writer: BundleWriter, component: str, offload: Offload | None, uses: Uses) -> None:
        self._writer, self._component, self._offload, self._uses = writer, component, offload, uses
        self._features: set[str] = set()
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._rows: dict[str, GroupEntry | None] = {}  # in the module's order; None is still to be written

    def add(self, module: torch.nn.Module) -> None:
        """Takes the weights that have data; `module` is the component after all passes."""
        for name, tensors in groups_of(module, self._offload, self._uses).items():
            self._rows.setdefault(name, None)
            waiting = self._waiting.setdefault(name, {})
            waiting |= {key: tensor for key, tensor in tensors.items() if not tensor.is_meta}
            if waiting and len(waiting) == len(tensors):
                self._rows[name] = self._write(name, waiting)
                del self._waiting[name], waiting

    def packed(self) -> Packed:
        """Returns what was written.

        Raises:
            PassError: a weight never came: a pass took the data of another one, or left none.
        """
        for name, row in self._rows.items():
            if row is None:
                raise PassError(f"component {self._component}: the passes left weights of {name} without data")
        rows = tuple(row for row in self._rows.values() if row)
        return Packed(weights={} if self._uses.gone else {self._component: rows}, features=frozenset(self._features))

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> GroupEntry:
        path = weights_file(self._component, name)
        turned = sorted(key for key, tensor in tensors.items() if is_channels_last(tensor))
        self._features |= {CHANNELS_LAST} if turned else set()
        flat = {key: as_stored(tensor) for key, tensor in tensors.items()}
        # One entry and no more: safetensors writes several in an order of chance, and a bundle's bytes are no chance.
        metadata = {CHANNELS_LAST: json.dumps(turned)} if turned else {"format": "pt"}
        safetensors.torch.save_file(flat, self._writer.path(path), metadata=metadata)
        self._writer.add(path, "weights")
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        return GroupEntry(name=name, file=path, tensors=len(tensors), bytes=size)


def groups_of(module: torch.nn.Module, offload: Offload | None, uses: Uses) -> dict[str, dict[str, torch.Tensor]]:
    """Returns a component's weights by the group that they lie in, and by name."""
    together = offload.num_blocks_per_group if offload else 1
    blocks = [name for name, _ in repeated_blocks(module)]
    heads = {block: blocks[index - index % together] for index, block in enumerate(blocks)}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in () if uses.gone else weights_of(module):
        if name in uses.left_out:
            continue
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        key = heads[block] if block else REST
        if name not in uses.read:
            key = UNUSED
        elif name in uses.before:
            key = before_loop(key)
        groups.setdefault(key, {})[name] = tensor.detach()
    return groups


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as its file holds it: in memory order, [N, H, W, C] if channels are last."""
    return tensor.permute(0, 2, 3, 1) if is_channels_last(tensor) else tensor.contiguous()
