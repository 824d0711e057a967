"""`weights/`: what the passes left."""

from __future__ import annotations

import json
from collections.abc import Collection

import safetensors.torch
import torch

from diffkiln.bundle import BundleWriter, GroupRow
from diffkiln.layers import is_channels_last, repeated_blocks
from diffkiln.packing.packed import Packed
from diffkiln.program import REGION, weight_in
from diffkiln.record.components import weights_of
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.weights import CHANNELS_LAST, REST, UNUSED
from diffkiln.spec import Offload


def weights_used(recording: Recording, held: Collection[str] = ()) -> dict[str, frozenset[str]]:
    """By component, the weights that programs read; the others serve `as_diffusers` only.

    Args:
        recording: what was recorded.
        held: components whose engines hold the weights of their regions themselves.
    """
    used: dict[str, set[str]] = {name: set() for name in recording.modules}
    for name, module in recording.modules.items():
        for program in module.programs.values():
            used[name].update(program.weights)
            for op in program.ops:
                if op.name == REGION and name not in held:
                    region = module.regions[op.attrs["region"]]
                    used[name].update(weight_in(op, weight) for weight in region.weights)
    for programs in recording.calls:
        for weight in (weight for program in programs.values() for weight in program.weights):
            component, _, name = weight.partition("/")
            used.setdefault(component, set()).add(name)
    return {name: frozenset(weights) for name, weights in used.items()}


def pack_weights(
    writer: BundleWriter, component: str, module: torch.nn.Module, packed: Packed, used: frozenset[str]
) -> tuple[GroupRow, ...]:
    """`weights/<component>/`: one file a group of blocks, one for the rest, one for what no program reads."""
    rows: list[GroupRow] = []
    for name, tensors in _groups(module, packed.offload, used).items():
        path = f"weights/{component}/{name}.safetensors"
        turned = sorted(key for key, tensor in tensors.items() if is_channels_last(tensor))
        packed.features |= {CHANNELS_LAST} if turned else set()
        flat = {key: as_stored(tensor) for key, tensor in tensors.items()}
        metadata = {"format": "pt"} | ({CHANNELS_LAST: json.dumps(turned)} if turned else {})
        safetensors.torch.save_file(flat, writer.path(path), metadata=metadata)
        writer.add(path, "weights")
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        rows.append(GroupRow(name=name, file=path, tensors=len(tensors), bytes=size))
    return tuple(rows)


def _groups(
    module: torch.nn.Module, offload: Offload | None, used: frozenset[str]
) -> dict[str, dict[str, torch.Tensor]]:
    together = offload.num_blocks_per_group if offload else 1
    blocks = [name for name, _ in repeated_blocks(module)]
    heads = {block: blocks[index - index % together] for index, block in enumerate(blocks)}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights_of(module):
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        key = UNUSED if name not in used else heads[block] if block else REST
        groups.setdefault(key, {})[name] = tensor.detach()
    return groups


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as its file holds it: in the order of its memory, [N, H, W, C] where channels are last."""
    return tensor.permute(0, 2, 3, 1) if is_channels_last(tensor) else tensor.contiguous()
