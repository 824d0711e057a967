"""Calls that cast a component while they run: SDXL's encode images in float32, whatever type the autoencoder has.

A component that is cast to a wider type, and back to its own, is recorded with the casts of its weights written into
its programs. The bundle keeps the weights in their own type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import dtype_name

_Floating = list[tuple[dict[str, Any], str, torch.Tensor]]


@contextlib.contextmanager
def casted(module: torch.nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Casts the floating-point weights of a module to this type inside the `with` block; None leaves them alone.

    Casts are operations like others: under a tape they are recorded.
    """
    floating = _floating(module) if dtype else []
    try:
        for table, name, tensor in floating:
            table[name] = tensor.to(dtype)
        yield
    finally:
        for table, name, tensor in floating:
            table[name] = tensor


def _floating(module: torch.nn.Module) -> _Floating:
    return [
        (table, name, tensor)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None and tensor.is_floating_point()
    ]


class Casts:
    """The types that a call casts its components to.

    Args:
        pipe: the meta model.
    """

    def __init__(self, pipe: Any) -> None:
        self._modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self._own = {name: frozenset(t.dtype for *_, t in _floating(part)) for name, part in self._modules.items()}
        self._now: dict[str, tuple[torch.dtype, contextlib.ExitStack]] = {}

    def of(self, name: str) -> torch.dtype | None:
        """Returns the type that a component is cast to at present; None if it has its own."""
        return self._now[name][0] if name in self._now else None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notices casts of components inside the `with` block; afterwards all have their own types.

        Raises:
            RecordError: within, where a call casts a component to a type that does not hold its weights.
        """
        try:
            for name, module in self._modules.items():
                module.__dict__["to"] = self._to(name, module)
            yield
        finally:
            for name, module in self._modules.items():
                module.__dict__.pop("to", None)
                self._restore(name)

    def _to(self, name: str, module: torch.nn.Module) -> Callable[..., torch.nn.Module]:
        def to(*args: Any, **kwargs: Any) -> torch.nn.Module:
            dtype = torch._C._nn._parse_to(*args, **kwargs)[1]  # pyright: ignore[reportAttributeAccessIssue]
            if dtype is not None and dtype != self.of(name):
                self._restore(name)
                if self._own[name] - {dtype}:
                    self._cast(name, module, dtype)
            return module

        return to

    def _cast(self, name: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
        narrower = [own for own in self._own[name] if torch.promote_types(own, dtype) != dtype]
        if narrower:
            raise RecordError(
                f"the call casts {name} from {dtype_name(narrower[0])} to {dtype_name(dtype)} while it runs, which "
                f"loses digits of its weights. Cast the whole pipeline to one type ($.source.dtype)"
            )
        stack = contextlib.ExitStack()
        with _disable_current_modes():
            stack.enter_context(casted(module, dtype))
        self._now[name] = dtype, stack

    def _restore(self, name: str) -> None:
        if name in self._now:
            self._now.pop(name)[1].close()
