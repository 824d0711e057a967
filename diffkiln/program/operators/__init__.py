"""The closed list of ATen operators that a program may name, safe by construction.

No operator writes to its arguments, draws random numbers, reads a file, or depends on anything but its arguments. None
reaches outside of its tensors: each has an entry that bounds its arguments and predicts the types of its results, and
the few that torch leaves unchecked are run by the interpreter in a checked form. An operator that is not in the list
stops a recording, and a bundle that names it is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffkiln.program.ir import Op
from diffkiln.program.operators import (
    creation,
    indexing,
    layers,
    padding,
    parts,
    pointwise,
    products,
    reductions,
    shapes,
    signals,
)
from diffkiln.program.operators.promotion import SIZES, nbytes
from diffkiln.program.operators.table import OPERATORS, Number, Operator, Refused

__all__ = ["OPERATORS", "RESHAPES", "SIZES", "Number", "Operator", "Refused", "allowed", "nbytes", "safe_equal"]

#: Imported for the entries that each makes.
_FILLED = (creation, indexing, layers, padding, parts, pointwise, products, reductions, shapes, signals)

#: Views whose legality depends on strides, and strides depend on kernels and devices. `reshape` always holds.
RESHAPES: frozenset[str] = frozenset(
    {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default", "aten.reshape.default"}
)

#: Operators that are not in the list, the one that is recorded in their place, and the arguments that it takes.
_EQUALS: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "aten.empty.memory_format": ("aten.zeros.default", 1, ("dtype", "layout", "device", "pin_memory")),
    "aten.empty_like.default": (
        "aten.zeros_like.default",
        1,
        ("dtype", "layout", "device", "pin_memory", "memory_format"),
    ),
    "aten.new_empty.default": ("aten.new_zeros.default", 2, ("dtype", "layout", "device", "pin_memory")),
    "aten.new_empty_strided.default": ("aten.new_zeros.default", 2, ("dtype", "layout", "device", "pin_memory")),
    "aten._reshape_alias.default": ("aten.reshape.default", 2, ()),
    "aten._unsafe_view.default": ("aten.reshape.default", 2, ()),
}

#: torch's second names of operators, for every overload.
_ALIASES: Mapping[str, str] = {
    "absolute": "abs",
    "arctan2": "atan2",
    "clip": "clamp",
    "divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "subtract": "sub",
}


def allowed(name: str) -> bool:
    """Returns True if `name`, such as "aten.add.Tensor", is in the list."""
    return name in OPERATORS


def has_equal(name: str) -> bool:
    """Returns True if another operator of the list is recorded in the place of this one."""
    return name in _EQUALS or _alias(name) is not None


def _alias(name: str) -> str | None:
    """Returns the operator of the list of which this is another name."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    other = f"{namespace}.{_ALIASES.get(packet, '')}.{overload}"
    return other if packet in _ALIASES and allowed(other) else None


def safe_equal(op: Op) -> Op:
    """Returns the operation by an operator of the list, where its own gives memory as it was found or believes strides.

    Bundles of earlier versions hold such operations.
    """
    if alias := _alias(op.name):
        return replace(op, name=alias)
    if op.name not in _EQUALS:
        return op
    name, takes, keywords = _EQUALS[op.name]
    kept: dict[str, Any] = {key: value for key, value in op.kwargs.items() if key in keywords}
    return replace(op, name=name, args=op.args[:takes], kwargs=kept)
