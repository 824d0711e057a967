"""Blocks that compute the same, told by looking at them: recording one of them is enough.

Two modules are alike when every submodule has the same class, the same attributes, weights of the same shapes and
types, and buffers of the same values. Whatever cannot be compared counts as different, which costs time and nothing
else.

transformers numbers the layers of a model, for their places in a cache of keys and values. The number of a layer makes
a difference only where the layer reads it, which is watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: The number of a layer.
_INDEX = "layer_idx"
_INTERNAL = frozenset(torch.nn.Module().__dict__) | {"forward", _INDEX}

_Found = TypeVar("_Found")


class OncePerStructure(Generic[_Found]):
    """The results of blocks' calls, found once for alike blocks.

    Args:
        blocks: all that may be asked for. They must live as long as this does.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module]) -> None:
        self._marks = {block: (structural_key(block), _indices(block)) for block in blocks}
        self._found: dict[Hashable, _Found] = {}

    def get(self, block: torch.nn.Module, arguments: Hashable, find: Callable[[], _Found]) -> _Found:
        """Returns the result of `find` for this block; an earlier one if an alike block had the same arguments. `find`
        runs the block's forward.
        """
        alike, indices = self._marks[block]
        of_any, of_this = (alike, arguments), (alike, arguments, indices)
        for key in (of_any, of_this):
            if key in self._found:
                return self._found[key]
        with _index_reads(block) as reads:
            found = find()
        self._found[of_this if reads else of_any] = found
        return found


def _indices(module: torch.nn.Module) -> Hashable:
    return tuple(part.__dict__.get(_INDEX) for part in module.modules())


@contextlib.contextmanager
def _index_reads(module: torch.nn.Module) -> Iterator[list[torch.nn.Module]]:
    """Collects the parts whose index is read inside the `with` block."""
    reads: list[torch.nn.Module] = []

    def read(part: torch.nn.Module) -> Any:
        reads.append(part)
        return part.__dict__[_INDEX]

    def write(part: torch.nn.Module, index: Any) -> None:
        part.__dict__[_INDEX] = index

    with contextlib.ExitStack() as stack:
        for cls in {type(part) for part in module.modules() if _INDEX in part.__dict__}:
            stack.enter_context(mock.patch.object(cls, _INDEX, property(read, write), create=True))
        yield reads


def structural_key(module: torch.nn.Module) -> Hashable:
    """Returns a key that alike modules share, whatever their index."""
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
