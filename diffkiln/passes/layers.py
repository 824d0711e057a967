"""Which layers of a module still have plain weights, and which weights have data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkiln.interpreter.layers import Stored

#: Linear layers by name.
Layers = Mapping[str, torch.nn.Linear]


def has_no_data(tensor: torch.Tensor) -> bool:
    """Returns True if a tensor has a shape and no data."""
    return tensor.is_meta


def is_quantized(part: torch.nn.Module) -> bool:
    """Returns True if a layer's weight is no plain tensor any more."""
    weight = part._parameters.get("weight")
    if weight is None:
        return isinstance(part, Stored)
    return is_traceable_wrapper_subclass(weight)


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Returns the linear layers with plain weights that they own, by name."""
    owners = Counter(id(weight) for part in module.modules() for weight in part._parameters.values())
    linear = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    plain = {name: part for name, part in linear.items() if not is_quantized(part)}
    return {name: part for name, part in plain.items() if owners[id(part.weight)] == 1}
