"""Weights that were quantized before: folders that torchao and bitsandbytes left, as diffusers and transformers save
them.

What a layer was quantized to is read off the header and the configuration; its numbers are taken as they are, into the
same layers that the pass `quantize` makes. What has no such layer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkiln.errors import SourceError
from diffkiln.interpreter.layers import FourBit, Int8, store
from diffkiln.interpreter.layers.torchao import joined, meta_linear, type_in
from diffkiln.models.checkpoint import Checkpoint, SavedTensor

_PART = "._weight_"
_STATE = ".weight.quant_state.bitsandbytes__"
#: int8 weights of bitsandbytes are multiples of their row's largest magnitude / 127.
_INT8_MAX = 127.0
#: Why no engine holds the layers of bitsandbytes.
UNCOMPILED = "bitsandbytes' layers are unpacked at every call, and an engine would repeat that. Do not compile it"
_HINT = "Give the model that they were quantized from, and let the pass `quantize` do it"


@dataclass(frozen=True)
class QuantizedLayers:
    """The layers of a component that are quantized already.

    Attributes:
        backend: "torchao" or "bitsandbytes".
        type: as the pass `quantize` calls it.
        layers: layer → part → the tensor of the checkpoint.
        states: layer → what bitsandbytes writes beside its tensors.
        granularity: of float8_dynamic.
    """

    backend: str
    type: str
    layers: Mapping[str, Mapping[str, str]]
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    granularity: str = "per_row"

    def notice(self, component: str) -> str:
        """Returns what a user should know of the component."""
        notice = f"{component} is quantized already: {len(self.layers)} layers by {self.backend} to {self.type}"
        if self.type == "int8":
            notice += ", which multiply with activations as they are, and not as LLM.int8() does"
        return notice

    def parts(self) -> set[str]:
        """Returns the tensors of the checkpoint that layers are made of."""
        return {key for own in self.layers.values() for key in own.values()}


def read_layers(config: Mapping[str, Any], checkpoint: Checkpoint, root: Path) -> QuantizedLayers:
    """Returns which layers of a checkpoint are quantized, and to what.

    Args:
        config: `quantization_config` of the component.
        checkpoint: its weights, of which the descriptions of quantized tensors are read.
        root: its folder.

    Raises:
        SourceError: in a way that has no layers here.
    """
    method = str(config.get("quant_method"))
    if method == "torchao":
        return _of_torchao(config, checkpoint)
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        return _of_four_bits(checkpoint, root)
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        return _of_eight_bits(checkpoint)
    raise SourceError(f"the weights are quantized already, by {method[:40]}, which has no layers here. {_HINT}")


def _of_torchao(config: Mapping[str, Any], checkpoint: Checkpoint) -> QuantizedLayers:
    try:
        kind, granularity = type_in(config)
    except ValueError as error:
        reason = f"the weights are quantized already, by torchao's {error}, which has no layers here"
        raise SourceError(f"{reason}. {_HINT}") from error
    layers: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        if _PART in key:
            layer, _, part = key.partition(_PART)
            layers.setdefault(layer, {})[part] = key
    return QuantizedLayers("torchao", kind, layers, granularity=granularity)


def _of_four_bits(checkpoint: Checkpoint, root: Path) -> QuantizedLayers:
    layers: dict[str, dict[str, str]] = {}
    states: dict[str, Mapping[str, Any]] = {}
    for key, row in checkpoint.tensors.items():
        if _STATE not in key:
            continue
        layer = key.partition(_STATE)[0]
        state = states[layer] = _state(root, key, row)
        names = {"weight_data": "weight", "weight_table": "weight.quant_map", "weight_absmax": "weight.absmax"}
        if "nested_offset" in state:
            names |= {
                "weight_absmax_table": "weight.nested_quant_map",
                "weight_absmax_scale": "weight.nested_absmax",
            }
            if state.get("nested_blocksize") != FourBit.nested_block:
                raise SourceError(f"{layer}: its scales are quantized in blocks that have no layers here. {_HINT}")
        layers[layer] = {part: f"{layer}.{name}" for part, name in names.items()} | {"": key}
        if missing := [name for name in layers[layer].values() if name not in checkpoint.tensors]:
            raise SourceError(f"its weights lack {missing[0]}")
    kinds = {str(state.get("quant_type")) for state in states.values()}
    if len(kinds) != 1:
        raise SourceError(f"the weights are said to be quantized to 4 bits, and no layer is. {_HINT}")
    return QuantizedLayers("bitsandbytes", kinds.pop(), layers, states)


def _state(root: Path, key: str, row: SavedTensor) -> Mapping[str, Any]:
    """Reads the description that bitsandbytes writes of a tensor: JSON, as bytes."""
    if row.dtype != "uint8" or row.nbytes > 4096:
        raise SourceError(f"{key} is no description of a quantized tensor")
    try:
        state = json.loads(bytes(_read(root, row, key).numpy()))
        size = state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{key} is no description of a quantized tensor") from error
    if type(size) is not int or not 0 < size <= 2**20:
        raise SourceError(f"{key} has blocks of {str(size)[:20]} weights")
    return state


def _of_eight_bits(checkpoint: Checkpoint) -> QuantizedLayers:
    layers = {
        key.removesuffix(".SCB"): {"weight_data": f"{key.removesuffix('.SCB')}.weight", "weight_scale": key}
        for key in checkpoint.tensors
        if key.endswith(".SCB")
    }
    for layer, own in layers.items():
        if f"{layer}.weight_format" in checkpoint.tensors:
            own[""] = f"{layer}.weight_format"
    return QuantizedLayers("bitsandbytes", "int8", layers)


def plain(checkpoint: Checkpoint, quantized: QuantizedLayers) -> Checkpoint:
    """Returns a checkpoint with the tensors of what is not quantized."""
    parts = quantized.parts()
    return Checkpoint(checkpoint.files, {key: row for key, row in checkpoint.tensors.items() if key not in parts})


def put_quantized(
    module: nn.Module, name: str, root: Path, checkpoint: Checkpoint, quantized: QuantizedLayers, *, data: bool
) -> None:
    """Gives a module without data the layers that its checkpoint holds.

    Args:
        module: with its final types, on the meta device; changed in place.
        name: of the component, for messages.
        root: its folder.
        checkpoint: all of its tensors.
        quantized: those of layers.
        data: whether the layers get their weights.

    Raises:
        SourceError: the checkpoint does not fit the module.
    """
    for layer, own in quantized.layers.items():
        try:
            linear = module.get_submodule(layer)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise SourceError(
                f"component {name}: {layer} is quantized, and is no linear layer of {type(module).__name__}"
            )
        parts = {part: _read(root, checkpoint.tensors[key], key) for part, key in own.items() if part} if data else None
        try:
            _put(linear, layer, quantized, parts)
        except ValueError as error:
            raise SourceError(f"component {name}: {layer} does not fit: {error}") from error


def _put(linear: nn.Linear, layer: str, quantized: QuantizedLayers, parts: dict[str, torch.Tensor] | None) -> None:
    if quantized.backend == "torchao":
        if parts is None:
            meta_linear(linear, quantized.type, quantized.granularity)
        else:
            weight = joined(linear.weight, parts, quantized.type, quantized.granularity)
            linear.weight = nn.Parameter(weight, requires_grad=False)
    elif quantized.type == "int8":
        if parts is not None:
            parts["weight_scale"] = parts["weight_scale"].float().unsqueeze(-1) / _INT8_MAX
        store(linear, Int8(), parts)
    else:
        state = quantized.states[layer]
        nested = "nested_offset" in state
        if parts is not None:
            parts["weight_data"] = parts["weight_data"].reshape(-1)
            if nested:
                parts["weight_absmax_offset"] = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        store(linear, FourBit(int(state["blocksize"]), nested), parts)


def fill(module: nn.Module, name: str, root: Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns the weights of what is not quantized, by their names in the module; tied ones under each of theirs.

    Raises:
        SourceError: the checkpoint lacks one, or has it in another shape.
    """
    found: dict[str, torch.Tensor] = {}
    for names in _aliases(module):
        tensor = module.state_dict(keep_vars=True)[names[0]]
        there = next((key for key in names if key in checkpoint.tensors), None)
        if there is None and isinstance(tensor, nn.Parameter):
            raise SourceError(f"component {name}: its weights lack {names[0]}")
        if there is None:
            continue
        row = checkpoint.tensors[there]
        if row.shape != tuple(tensor.shape):
            raise SourceError(f"component {name}: {there} is {row.shape}, and the model has {tuple(tensor.shape)}")
        found |= dict.fromkeys(names, _read(root, row, there).to(tensor.dtype))
    return found


def _aliases(module: nn.Module) -> Iterator[list[str]]:
    """Yields the names of each plain weight without data."""
    by_tensor: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter):
            by_tensor.setdefault(id(tensor), []).append(key)
    yield from by_tensor.values()


def _read(root: Path, row: SavedTensor, key: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(root / row.file, framework="pt") as opened:
            return opened.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{key} cannot be read from {row.file}: {error}") from error
