"""Convolutional upscalers that lie in one file of weights: one module for each architecture, known by its tensors.

A plug-in tells from the names and shapes of a file's tensors whether they are its own, and makes the module of them. It
is given tensors without data first, and what it makes then must have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

#: What trainers put before the name of every tensor.
_PREFIXES = ("params_ema.", "params.")


class Upscaler(Protocol):
    """An architecture of upscalers."""

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Returns True if tensors of these names and shapes are a model of this architecture."""
        ...

    def made(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Returns the module with these tensors as its weights, on their devices.

        Raises:
            Exception: they are not what the architecture needs.
        """
        ...


def plain_names(names: Mapping[str, object]) -> dict[str, str]:
    """Returns the name of every tensor of a file without what a trainer put before all of them."""
    prefix = next((each for each in _PREFIXES if names and all(name.startswith(each) for name in names)), "")
    return {name: name.removeprefix(prefix) for name in names}


def filled(build: Callable[[], nn.Module], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns the module that `build` makes, with these tensors in the place of its own.

    Raises:
        RuntimeError: names or shapes are others.
    """
    with torch.device("meta"):
        module = build()
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


__all__ = ["Upscaler", "filled", "plain_names"]
