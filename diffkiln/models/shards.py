"""A component's weights a shard at a time: whole modules in which some weights have data and the others are meta
models.

A shard is made of whole *units*: one is a repeated block, and one is everything outside of them. It is read from the
checkpoint tensor by tensor, by name, and comes out as `load_module` would have loaded it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from diffkiln.errors import SourceError
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.models.checkpoint import Checkpoint
from diffkiln.models.meta import replace_weights, skeleton
from diffkiln.models.source import SourceModel
from diffkiln.models.stand_ins import fill_with_noise

#: The unit of what lies outside of the repeated blocks.
OUTSIDE = ""


@dataclass(frozen=True, eq=False)
class Shards:
    """A component that can be loaded a shard at a time.

    Attributes:
        module: as `from_pretrained` builds it, its parameters on the meta device; never changed.
        units: the name of the block that each weight is of, by the weight's name; tied weights by their first.
    """

    source: SourceModel
    name: str
    module: nn.Module
    units: Mapping[str, str]
    _saved: Mapping[str, str]

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of every unit, as they are loaded, in the order of the module."""
        sizes: dict[str, int] = {}
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            if key in self.units:
                sizes[self.units[key]] = sizes.get(self.units[key], 0) + tensor.nbytes
        return sizes

    def load(self, units: Collection[str]) -> nn.Module:
        """Returns a copy of the module with data only in the weights of these units.

        Raises:
            SourceError: the checkpoint cannot be read any more.
        """
        module = copy.deepcopy(self.module)
        replace_weights(module, lambda key, meta: self._weight(key, meta, units))
        if (seed := self.source.seed_of(self.name)) is not None:
            fill_with_noise(module, seed)
        return module

    def _weight(self, key: str, meta: torch.Tensor, units: Collection[str]) -> torch.Tensor:
        if self.units[key] not in units:
            return meta.to("meta")
        if key in self._saved:
            return self._read(self._saved[key], meta.dtype)
        return torch.empty_like(meta, device="cpu") if meta.is_meta else meta  # a buffer that is not saved

    def _read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor of the checkpoint, in memory of its own."""
        from safetensors import SafetensorError, safe_open

        file = self.source.components[self.name].root / self.source.checkpoint(self.name).tensors[key].file
        try:
            # The file's pages count as this process's memory for as long as it is open: so it is, for one tensor.
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(key).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"component {self.name}: {key} cannot be read from {file.name}: {error}") from error


def open_shards(source: SourceModel, name: str, dtype: str | None = None) -> Shards | str:
    """Returns the component, to be loaded a shard at a time; or the reason why it can only be loaded whole.

    Args:
        dtype: as for `load_module`.
    """
    if name in source.gguf:
        return "its library converts the tensors of a GGUF file all at once"
    component = source.components[name]
    if component.file is not None:
        return "its library converts the tensors of a single file all at once"
    if component.quantized is not None:
        return "its weights are quantized already"
    if component.members:
        return "it is made of several models"
    module = skeleton(source, name, dtype)
    blocks = [block for block, _ in repeated_blocks(module)]
    if not blocks:
        return f"{type(module).__name__} has no repeated blocks"
    names = _names(module)
    units = {alias: unit_of(alias, blocks) for aliases in names.values() for alias in aliases}
    for first, aliases in names.items():
        if apart := [alias for alias in aliases if units[alias] != units[first]]:
            return f"{first} and {apart[0]}, in different blocks, are one tensor"
    saved: dict[str, str] = {}
    if source.seed_of(name) is None:
        found = _saved(module, names, source.checkpoint(name))
        if isinstance(found, str):
            return found
        saved = found
    return Shards(source, name, module, {first: units[first] for first in names}, saved)


def _names(module: nn.Module) -> dict[str, list[str]]:
    """Returns every weight with all its names, by the first of them."""
    by_tensor: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(key)
    return {names[0]: names for names in by_tensor.values()}


def unit_of(name: str, blocks: Collection[str]) -> str:
    """Returns the block that holds the weight of this name, or `OUTSIDE`."""
    return next((block for block in blocks if name.startswith(f"{block}.")), OUTSIDE)


def _saved(module: nn.Module, names: Mapping[str, list[str]], checkpoint: Checkpoint) -> dict[str, str] | str:
    """Returns each weight's name in the checkpoint; or why its library must find it out by loading everything."""
    parameters = {key for key, _ in module.named_parameters()}
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict(keep_vars=True).items()}
    saved: dict[str, str] = {}
    for first, aliases in names.items():
        there = [alias for alias in aliases if alias in checkpoint.tensors]
        if len(there) > 1:
            return f"its checkpoint holds {there[0]} and {there[1]}, which are one tensor"
        if there and checkpoint.tensors[there[0]].shape == shapes[first]:
            saved[first] = there[0]
        elif there or first in parameters:
            return f"its checkpoint holds no tensor of the name and shape of {first}"
    return saved
