"""Memory layouts of weights."""

from __future__ import annotations

from typing import Any

import torch

from diffkiln.interpreter.layers.blocks import repeated_blocks


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Returns True if a tensor [N, C, H, W] lies in memory as [N, H, W, C], and that is another order."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def to_channels_last(module: torch.nn.Module, try_only: bool = False) -> list[str]:
    """Lays out the weights of 2D convolutions outside of repeated blocks with their channels last.

    A 1 × 1 kernel is the same in both layouts and stays. Returns the names of the tensors that change, or would.
    """
    inside = {id(part) for _, block in repeated_blocks(module) for part in block.modules()}
    changed: list[str] = []
    for path, part in module.named_modules():
        if not isinstance(part, torch.nn.Conv2d) or id(part) in inside:
            continue
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for key, tensor in table.items():
                if tensor is None or tensor.dim() != 4:
                    continue
                laid = tensor.detach().to(memory_format=torch.channels_last)
                if is_channels_last(laid) and not is_channels_last(tensor):
                    changed.append(f"{path}.{key}")
                    if not try_only:
                        parameter = isinstance(tensor, torch.nn.Parameter)
                        table[key] = torch.nn.Parameter(laid, requires_grad=False) if parameter else laid
    return changed
