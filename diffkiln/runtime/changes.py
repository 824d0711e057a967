"""What is changed inside a block after its engine was plugged in: an engine would ignore it, so each call looks first.

An engine reads the block's weights at each call, so new values in them need nothing. What it cannot see is all else:
other layers (as an adapter puts them), other attention processors, hooks, numbers such as a scale, training mode.

Looking is cheap, since it compares the tables of attributes with copies of themselves, item by item, by identity. Only
where they differ is the block described anew: another processor of the same kind is no change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TENSORS = ("_parameters", "_buffers")
#: What nn.Module keeps for itself and no forward reads, and what hooks replace on the block itself, around the engine.
_ASIDE = frozenset({
    *_HOOKS, *_TENSORS, "_modules", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set",
    "_is_full_backward_hook",
})  # fmt: skip
_AROUND = frozenset({"forward", "_diffusers_hook", "_hf_hook", "_old_forward", "_compiled_call_impl"})
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.Tensor)
#: So deep attributes of attributes are looked at.
_DEEP = 4

Described = dict[tuple[str, str], Any]


class Watch:
    """Notices changes inside one block.

    Args:
        block: as it was compiled.
        held: whether the engine has weights of its own, so that other weights would be ignored.
        filed: whether weights lie in files between their uses, so that what is written to them in place would be lost.
    """

    def __init__(self, block: torch.nn.Module, held: bool = False, filed: bool = False) -> None:
        self._block, self._held, self._filed = block, held, filed
        self._description = _described(block)
        self._tensors = [*self._weights_now()] if held or filed else []
        self._written = [tensor._version for tensor in self._tensors]
        self._remember()

    def change(self) -> str:
        """Returns what differs from the block as it was compiled; empty where nothing does."""
        return self._other_weights() or self._other_parts()

    def _other_parts(self) -> str:
        try:
            same = [[*table.values()] for table in self._tables] == self._values and self._kinds_now() == self._kinds
        except Exception:  # what was compared is no number: tensors, arrays
            same = False
        if same:
            return ""
        if reason := _difference(self._description, _described(self._block)):
            return reason
        self._remember()
        return ""

    def _remember(self) -> None:
        self._tables = [*_tables(self._block)]
        self._values = [[*table.values()] for table in self._tables]
        tables = (table for part in self._block.modules() for table in (part._parameters, part._buffers))
        self._weights = [table for table in tables if table]
        self._kinds = self._kinds_now()

    def _kinds_now(self) -> list[type]:
        return [value.__class__ for table in self._weights for value in table.values()]

    def _weights_now(self) -> Iterator[Any]:
        for part in self._block.modules():
            for table in (part._parameters, part._buffers):
                yield from (tensor for tensor in table.values() if tensor is not None)

    def _other_weights(self) -> str:
        if self._held and [*map(id, self._weights_now())] != [*map(id, self._tensors)]:
            return "its weights were replaced, and the engine has its own"
        if [tensor._version for tensor in self._tensors] != self._written:
            lost = "its engine has its own" if self._held else "they are read from files before each use"
            return f"its weights were changed in memory, and {lost}"
        return ""


def _tables(block: torch.nn.Module) -> Iterator[Mapping[str, Any]]:
    """Returns the tables whose items a forward of the block may read."""
    for part in block.modules():
        if part._modules:
            yield part._modules
        if part is block:
            continue  # hooks around the block run, whatever they are
        yield part.__dict__
        yield from (getattr(part, name) for name in _HOOKS)
        yield from (value.__dict__ for value in part.__dict__.values() if _has_attributes(value))


def _has_attributes(value: Any) -> bool:
    return not isinstance(value, (*_PLAIN, *_CODE, dict, list, tuple)) and isinstance(
        getattr(value, "__dict__", None), dict
    )


def _described(block: torch.nn.Module) -> Described:
    """Describes the block by path: classes, attributes, hooks, and which weights there are."""
    found: Described = {}
    for path, part in block.named_modules():
        found[path, "class"] = type(part)
        for key, value in part.__dict__.items():
            if key not in _ASIDE and (part is not block or key not in _AROUND):
                found[path, key] = _of(value, _DEEP)
        if part is not block:
            found[path, "hooks"] = [tuple(map(id, getattr(part, name).values())) for name in _HOOKS]
        for name in _TENSORS:
            found[path, name] = {key: type(value) for key, value in getattr(part, name).items()}
    return found


def _of(value: Any, deep: int) -> Any:
    """Returns a value as it can be compared: by what it holds where that is plain, else by which object it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, MethodType):
        return id(value.__func__), id(value.__self__)
    if isinstance(value, _CODE) or deep == 0:
        return id(value)
    if isinstance(value, dict):
        return {_of(key, 0): _of(item, deep - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_of(item, deep - 1) for item in value]
    if _has_attributes(value):
        return type(value), _of(value.__dict__, deep - 1)
    return id(value)


def _difference(before: Described, now: Described) -> str:
    """Names the first thing that differs."""
    for key in (*now, *before):
        path, what = key
        was, found = before.get(key), now.get(key)
        if key in before and key in now and was == found:
            continue
        where = path or "the block"
        if what == "class":
            names = [kind.__name__ if kind else "nothing" for kind in (was, found)]
            return f"{where} was {names[0]} and is {names[1]}"
        if what == "hooks":
            return f"{where} has other forward hooks"
        return (
            f"{f'{path}.' if path else ''}{what} was changed" if what not in _TENSORS else f"{where} has other weights"
        )
    return ""
