"""Linear layers with room for adapters: pairs of narrow matrices beside the weight, zeros until an adapter is put in.

Each row of a batch has a factor for each slot, so rows may use different adapters, and the weight stays as it is. A
fused layer has a first matrix for each of its parts, and a part's rows of the second one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from diffkiln.interpreter.layers.fused import FUSED
from diffkiln.interpreter.layers.stored import Stored

#: Names of a layer's buffers: the first matrices [parts, slots, rank, inputs], the second ones [outputs, slots, rank],
#: and the factors [rows, parts · slots · rank].
DOWN, UP, FACTORS = "slot_down", "slot_up", "slot_factors"

#: Rows of the batch that the model around a layer was called with.
_rows: ContextVar[int | None] = ContextVar("rows", default=None)


class Slotted:
    """A mix-in for a linear layer's own class: what is in the slots is added to the layer's result."""

    _buffers: dict[str, torch.Tensor]

    def forward(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes the layer, and adds the slots where the rows of `given` are those of the batch."""
        result = super().forward(given, *args, **kwargs)  # type: ignore[misc]
        factors = _factors_of(self._buffers[FACTORS], given)
        return result if factors is None else result + self._added(given, factors)

    def _added(self, given: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        down, up = self._buffers[DOWN], self._buffers[UP].flatten(1)
        inner = functional.linear(given, down.flatten(0, 2)) * factors
        parts = down.shape[0]
        if parts == 1:
            return functional.linear(inner, up)
        pairs = zip(inner.chunk(parts, -1), up.chunk(parts, 0), strict=True)
        return torch.cat([functional.linear(part, rows) for part, rows in pairs], -1)


def _factors_of(factors: torch.Tensor, given: torch.Tensor) -> torch.Tensor | None:
    """Returns the factors [rows, 1, …, columns] of each row of a layer's input; None if its rows are not the batch's.

    A batch's row may be several of the layer's, one after the other, such as the frames of a video.
    """
    count = given.shape[0] if given.dim() > 1 else 0
    rows = _rows.get() or count
    if count < 1 or count % rows or rows > factors.shape[0]:
        return None
    own = factors[:rows]
    own = own if count == rows else own.repeat_interleave(count // rows, 0)
    return own.reshape(count, *[1] * (given.dim() - 2), -1)


def put_slots(module: torch.nn.Module, layers: Iterable[str], rank: int, slots: int, rows: int) -> None:
    """Gives linear layers of a module empty slots, in place.

    Args:
        module: it counts the rows of the batch that it is called with from now on.
        layers: names of layers that `can_have_slots`.
        rank: of each slot.
        slots: how many each layer has.
        rows: that a batch has at most.
    """
    for name in layers:
        layer: Any = module.get_submodule(name)
        parts, dtype, device = parts_of(name), dtype_of(layer), _device_of(layer)
        shapes = {
            DOWN: (parts, slots, rank, layer.in_features),
            UP: (layer.out_features, slots, rank),
            FACTORS: (rows, parts * slots * rank),
        }
        for key, shape in shapes.items():
            layer.register_buffer(key, torch.zeros(shape, dtype=dtype, device=device))
        layer.__class__ = _slotted(type(layer))
    module.__class__ = _counting(type(module))


def put_slots_as_stored(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives a module the slots of which a bundle holds tensors, whose shapes are given by name."""
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == DOWN and len(shape) == 4 and f"{layer}.{FACTORS}" in shapes:
            put_slots(module, [layer], shape[2], shape[1], shapes[f"{layer}.{FACTORS}"][0])


def can_have_slots(name: str, layer: torch.nn.Module) -> bool:
    """Returns True for a linear layer that computes in floating-point numbers; of a fused one, with parts alike."""
    if not isinstance(layer, torch.nn.Linear) or isinstance(layer, Slotted):
        return False
    dtype = dtype_of(layer)
    return dtype.is_floating_point and dtype.itemsize > 1 and layer.out_features % parts_of(name) == 0


def parts_of(name: str) -> int:
    """Returns the number of layers that were fused into the layer of this name; 1 for any other."""
    return len(FUSED.get(name.rpartition(".")[2], (name,)))


def dtype_of(layer: torch.nn.Module) -> torch.dtype:
    """Returns the type that a layer computes in."""
    return layer.stored["weight"][1] if isinstance(layer, Stored) else layer._parameters["weight"].dtype  # type: ignore[union-attr]


def _device_of(layer: torch.nn.Module) -> torch.device:
    own: Any = layer._buffers["weight_data"] if isinstance(layer, Stored) else layer._parameters["weight"]
    return own.device


@cache
def _slotted(base: type) -> type:
    return type(base.__name__, (Slotted, base), {"__module__": base.__module__})


@contextmanager
def counted(rows: int | None) -> Iterator[None]:
    """Tells the layers how many rows the batch has, inside the `with` block."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


@cache
def _counting(base: Any) -> type:
    """Returns a class of the same name whose `forward` counts the rows of its first argument."""
    if hasattr(base, "counts_rows"):
        return base
    first = list(inspect.signature(base.forward).parameters)[1]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(first)
        with counted(given.shape[0] if isinstance(given, torch.Tensor) else len(given or ()) or None):
            return base.forward(self, *args, **kwargs)

    shown: Callable[..., Any] = forward
    shown.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    # In a class between them: what looks for methods that changed looks at classes of the original's name.
    between = type("CountsRows", (base,), {"forward": shown, "__module__": base.__module__, "counts_rows": True})
    return type(base.__name__, (between,), {"__module__": base.__module__})
