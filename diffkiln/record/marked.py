"""A component as the recorder took it, run with real tensors: what it folded is computed as it was folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from diffkiln.interpreter.nests import tensors_in
from diffkiln.interpreter.portable import evaluate


class Marked(TorchDispatchMode):
    """A mode that runs a component as it was recorded: operations on marked tensors by torch, all others portably.

    The recorder wrote the former down (diffkiln.record.tape) and folded the latter.

    Args:
        tensors: the component's inputs and weights.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._marks = [_Marks(tensors)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = list(tensors_in((args, kwargs)))
        if any(is_traceable_wrapper_subclass(tensor) for tensor in given):
            return NotImplemented  # a quantized tensor: it lowers itself to plain operators, which come back here
        marks = self._marks[-1]
        if not marks.include_any(given):
            return evaluate(func, args, kwargs)
        result = func(*args, **kwargs)
        marks.add(tensors_in(result))
        if func._schema.is_mutable:
            marks.add(_written(func, args))
        return result

    @contextmanager
    def alone(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Marks only these tensors inside the `with` block: the recorder takes each block by itself."""
        self._marks.append(_Marks(tensors))
        try:
            yield
        finally:
            self._marks.pop()

    def mark(self, tensors: Iterable[torch.Tensor]) -> None:
        """Marks these tensors, too."""
        self._marks[-1].add(tensors)


class _Marks:
    """Storages that are marked. A weak reference keeps a storage's address from being given again, not its memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._kept: dict[int, StorageWeakRef] = {}
        self._limit = 4096
        self.add(tensors)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._kept:
                self._kept[storage._cdata] = StorageWeakRef(storage)
        if len(self._kept) > self._limit:
            self._kept = {key: kept for key, kept in self._kept.items() if not kept.expired()}
            self._limit = 2 * len(self._kept) + 4096

    def include_any(self, tensors: Iterable[torch.Tensor]) -> bool:
        return any(tensor.untyped_storage()._cdata in self._kept for tensor in tensors)


def _written(func: Any, args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yields the arguments that an operator writes to."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info and argument.alias_info.is_write:
            yield from tensors_in(value)
