"""The weights that an engine holds itself, for the backends whose engines do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from diffkiln.errors import ExportError
from diffkiln.exporters.artefact import Lowering
from diffkiln.interpreter.aten import in_pairs


def held_weights(lowering: Lowering) -> dict[int, torch.Tensor]:
    """Returns the weights that the engine is to hold, by the position of the input that each replaces.

    Raises:
        ExportError: one is missing.
    """
    region = lowering.region
    if missing := [name for name in region.weights if name not in lowering.weights]:
        raise ExportError(f"the engine is to hold its weights, and {missing[0]} is not given")
    tensors = (in_pairs(lowering.weights[name].detach()).cpu().contiguous() for name in region.weights)
    return dict(enumerate(tensors, len(region.inputs)))


def digest_of(weights: Mapping[int, torch.Tensor]) -> str:
    """Returns the SHA-256 of tensors on the CPU, with their positions, types and shapes, in hexadecimal."""
    digest = hashlib.sha256()
    for position, tensor in weights.items():
        digest.update(f"{position} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
    return digest.hexdigest()
