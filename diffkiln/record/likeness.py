"""Blocks that compute the same, told by looking at them: recording one of them is enough.

Two modules are alike when every submodule has the same class, the same attributes, weights of the same shapes and
types, and buffers of the same values. Whatever cannot be compared counts as different, which costs time and nothing
else.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_INTERNAL = frozenset(torch.nn.Module().__dict__) | {"forward"}


def likeness(module: torch.nn.Module) -> Hashable:
    """A key that alike modules share."""
    return tuple(
        (name, type(part), tuple(_attributes(part.__dict__)), tuple(_tensors(part)))
        for name, part in module.named_modules()
    )


def _attributes(values: dict[str, Any]) -> Iterator[Hashable]:
    for name in sorted(values.keys() - _INTERNAL):
        yield name, _value(values[name])


def _value(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_value, value))
    if isinstance(value, dict):
        return dict, tuple((key, _value(item)) for key, item in value.items())
    own = getattr(value, "__dict__", None)
    if (
        own is not None
        and not isinstance(value, (type, torch.Tensor))
        and all(isinstance(v, _PLAIN) for v in own.values())
    ):
        return type(value), tuple(_attributes(own))
    return type(value), id(value)


def _tensors(part: torch.nn.Module) -> Iterator[Hashable]:
    for table in (part._parameters, part._buffers):
        for name, tensor in table.items():
            if tensor is None:
                yield name
            elif isinstance(tensor, FakeTensor) or tensor.is_meta:
                yield name, tensor.shape, tensor.dtype, tensor.stride()
            elif is_traceable_wrapper_subclass(tensor):
                inner = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
                parts = [getattr(tensor, attribute) for attribute in inner]
                if not all(isinstance(item, FakeTensor) for item in parts):
                    yield name, id(tensor)
                else:
                    yield name, type(tensor), *((item.shape, item.dtype) for item in parts)
            else:
                yield (
                    name,
                    tensor.dtype,
                    tensor.shape,
                    tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
