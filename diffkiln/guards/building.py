"""Modules built from a stranger's configuration, within limits.

A configuration is numbers that a library's constructors loop over and allocate by. They are looked at first, and while
a module is built its parts and its tables are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from diffkiln.errors import LimitExceeded, ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.interpreter.dtypes import DTYPES

#: No size of a model is larger, and what computes with one as 32 bits does not overflow.
_LARGEST = 2**31 - 1
#: Keys whose number is a count of layers: libraries make lists of that length before any layer.
_LAYERS = re.compile(r"(?:^|_)(?:layers?|blocks?|depths?)$")
#: Keys of numbers that are no size: frequencies, and what a text may not exceed.
_UNBOUNDED = re.compile(r"(?:^|_)(?:theta|base|max_length)$")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def check_config(config: Any, where: str, *, scheduler: bool = False) -> None:
    """Checks the numbers and types that a `config.json`, or a scheduler's configuration, states.

    Raises:
        LimitExceeded: A number is larger than the limits allow.
        ManifestInvalid: A type of elements is none of torch's.
    """
    for key, value in _leaves(config):
        if key in _DTYPE_KEYS and isinstance(value, str) and value.removeprefix("torch.") not in (*DTYPES, "auto"):
            raise ManifestInvalid(f"{where}: {key} is {value[:100]!r}, which is not a type of torch's")
        if type(value) is not int:
            continue
        if scheduler:
            active().check("timesteps", value, f"{where}, {key}")
        elif _LAYERS.search(key):
            active().check("modules", value, f"{where}, {key}")
        elif abs(value) > _LARGEST and not _UNBOUNDED.search(key):
            raise LimitExceeded(f"{where}: {key} is {value:,}, and no size of a model is above {_LARGEST:,}")


@contextmanager
def bounded_building(where: str) -> Iterator[None]:
    """Counts modules, and measures tensors before they are computed, inside the `with` block.

    Raises:
        LimitExceeded: A configuration makes more modules, or a larger table, than the limits allow.
    """
    count = 0

    def add(_module: torch.nn.Module, _name: str, _part: torch.nn.Module | None) -> None:
        nonlocal count
        count += 1
        active().check("modules", count, where)

    handle = register_module_module_registration_hook(add)
    try:
        with _Measured(where):
            yield
    finally:
        handle.remove()


class _Measured(TorchDispatchMode):
    """A mode that measures the result of each CPU operation on the meta device before it is computed."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _takes_memory(func):
            return func(*args, **kwargs)
        for tensor in _foreseen(func, args, kwargs):
            active().check("buffer_bytes", tensor.numel() * tensor.element_size(), self._where)
        return func(*args, **kwargs)


def _takes_memory(func: Any) -> bool:
    """Returns False for what makes views, writes to its argument, or only reserves memory, as parameters do."""
    schema = func._schema
    return not (schema.is_mutable or func.is_view or schema.name.startswith("aten::empty"))


def _foreseen(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the results' shapes; none if torch cannot foresee them, or if the CPU computes nothing."""
    given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in given) or kwargs.get("device") == torch.device("meta"):
        return []
    try:
        like = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, dict(kwargs)))
        if not given or "device" in kwargs:
            like[1]["device"] = torch.device("meta")
        result = func(*like[0], **like[1])
    except (RuntimeError, NotImplementedError, TypeError):
        return []
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every plain value of a configuration with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value
