"""A layer of any class with its weight stored in a form: `layer.weight` is computed when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from diffkiln.interpreter.dtypes import DTYPES
from diffkiln.interpreter.layers.storage import STORAGE_FORMATS, LowRank, StorageFormat


class Stored:
    """A mix-in for a layer's own class: the layer computes what it did, and its weight is stored in another form.

    The parts are persistent buffers, named after the parameter that they store: `weight_data`, `weight_scale`, ….
    """

    storage: StorageFormat
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]]
    _buffers: dict[str, torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        """Returns the weight, in the shape and type that it had before it was stored."""
        return self._restored("weight")

    def _restored(self, name: str) -> torch.Tensor:
        shape, dtype = self.stored[name]
        parts = {part: self._buffers[f"{name}_{part}"] for part in self.storage.parts(shape, dtype)}
        return self.storage.restore(parts, shape, dtype)


class StoredWithBias(Stored):
    """A mix-in for a format that stores the bias too."""

    @property
    def bias(self) -> torch.Tensor | None:
        """Returns the bias, or None."""
        return self._restored("bias") if "bias" in self.stored else None


def store(layer: torch.nn.Module, storage: StorageFormat, parts: Mapping[str, torch.Tensor] | None = None) -> None:
    """Changes a layer in place: its weight is stored in `storage` from now on.

    Args:
        layer: with a parameter `weight`, such as a linear layer or a convolution.
        storage: that can hold a weight of this shape.
        parts: what the weight is stored as, by buffer name; empty tensors on the weight's device if it is not given.
    """
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in storage.stores:
        parameter = layer._parameters.get(name)
        if parameter is None:
            continue
        stored[name] = tuple(parameter.shape), parameter.dtype
        del layer._parameters[name]
        for part, (shape, dtype) in storage.parts(*stored[name]).items():
            key = f"{name}_{part}"
            given = torch.empty(shape, dtype=dtype, device=parameter.device) if parts is None else parts[key]
            if (tuple(given.shape), given.dtype) != (shape, dtype):
                raise ValueError(f"{key} is {given.dtype} {tuple(given.shape)}, {storage.name} stores {dtype} {shape}")
            layer.register_buffer(key, given)
    if "bias" in storage.stores:
        layer._parameters.pop("bias", None)
    layer.__class__ = _class(type(layer), "bias" in storage.stores)
    layer.storage, layer.stored = storage, stored  # type: ignore[assignment]


def add_factors(layer: Stored, rank: int, factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
    """Changes a layer in place whose weight is stored: the product of two factors is added to it from now on.

    Args:
        layer: whose form stores a matrix, and nothing but the weight.
        rank: of the factors.
        factors: `down` [rank, columns] and `up` [rows, rank]; zeros if they are not given, which change nothing.
    """
    storage = LowRank(layer.storage.name, layer.storage.options(), rank)
    parts, device = storage.parts(*layer.stored["weight"]), layer._buffers["weight_data"].device
    for index, part in enumerate(("down", "up")):
        shape, dtype = parts[part]
        given = torch.zeros(shape, dtype=dtype, device=device) if factors is None else factors[index]
        layer._buffers[f"weight_{part}"] = given.to(device, dtype)
    layer.storage = storage


@cache
def _class(base: type, bias: bool) -> type:
    return type(base.__name__, (StoredWithBias if bias else Stored, base), {})


def described(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the stored layers of a module as JSON, by name, for `restore_layers`."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in module.named_modules():
        if isinstance(part, Stored):
            dtypes = {key: str(dtype).removeprefix("torch.") for key, (_, dtype) in part.stored.items()}
            found[name] = {"form": part.storage.name, "options": part.storage.options(), "dtypes": dtypes}
    return found


def storage_format_of(name: str) -> Any:
    """Returns the format of this name. GGUF's needs libraries that the others do not.

    Raises:
        KeyError: there is none.
    """
    if name == "gguf":
        from diffkiln.interpreter.layers.gguf import GGUF

        return GGUF
    return STORAGE_FORMATS[name]


def store_as_described(module: torch.nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Turns the layers of a module into those that `described` tells; their parts are empty.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: the description does not fit the module.
    """
    for name, row in layers.items():
        layer = module.get_submodule(name)
        for key, dtype in row["dtypes"].items():
            parameter = layer._parameters[key]
            if parameter is not None:
                wanted = DTYPES[dtype]
                layer._parameters[key] = torch.nn.Parameter(parameter.to(wanted), requires_grad=False)
        store(layer, storage_format_of(row["form"])(**row["options"]))
