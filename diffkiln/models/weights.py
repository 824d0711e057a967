"""The weights of a module, by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def weights_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight by name: parameters, persistent buffers, and the plain tensors inside quantized ones.

    Tied weights come once, under their first name.
    """
    seen: set[int] = set()
    kept = module.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield from _plain(name, tensor)


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for attribute in inner:
        yield from _plain(f"{name}.{attribute}", getattr(tensor, attribute))
