"""The table itself: how an operator is entered, and what its entry says.

An entry is a function whose parameters are those of torch's schema that a program may give. It checks the arguments and
returns the types of the results. An argument that the function does not name is refused, so is a value that it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diffkiln.program.ir import TensorType

#: The largest size of a dimension. It keeps products of a few sizes inside Python's fast integers and torch's int64.
MAX_SIZE = 2**40
#: The largest stride, padding, dilation or kernel of a window, far above any model's.
MAX_WINDOW = 2**16


class Refused(Exception):
    """An argument that an operator does not take. The message completes "this operation is refused: …"."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number that the caller brings, such as a guidance scale: of a known kind, not of a known value."""


Types = TensorType | Sequence[TensorType]
_Infer = TypeVar("_Infer", bound=Callable[..., Types])


@dataclass(frozen=True, slots=True)
class Operator:
    """One entry.

    Attributes:
        name: such as "aten.add.Tensor".
        infer: returns the types of the results; its parameters are those of the schema.
        view: True if the results share the memory of the first argument.
    """

    name: str
    infer: Callable[..., Types]
    view: bool = False


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, view: bool = False) -> Callable[[_Infer], _Infer]:
    """Enters the decorated function for these operators, named without "aten."; "add" is "add.default"."""

    def enter(infer: _Infer) -> _Infer:
        for short in names:
            packet, _, overload = short.partition(".")
            name = f"aten.{packet}.{overload or 'default'}"
            if name in OPERATORS:
                raise ValueError(f"the operator {name} is entered twice")
            OPERATORS[name] = Operator(name, infer, view)
        return infer

    return enter


def entries(text: str, infer: Callable[..., Types], view: bool = False) -> None:
    """Enters one function for many operators, named in a text with blanks between."""
    operator(*text.split(), view=view)(infer)


# -- what the entries check --


def require(holds: bool, reason: str) -> None:
    """Raises Refused with this reason unless the condition holds."""
    if not holds:
        raise Refused(reason)


def tensor(value: Any) -> TensorType:
    """Returns the argument if it is a tensor."""
    require(isinstance(value, TensorType), f"{value!r} is not a tensor")
    return value


def tensors(values: Any) -> list[TensorType]:
    """Returns the argument if it is a list of at least one tensor."""
    require(isinstance(values, tuple | list) and len(values) > 0, "a list of tensors is needed")
    return [tensor(value) for value in values]


def integer(value: Any, low: int = -MAX_SIZE, high: int = MAX_SIZE) -> int:
    """Returns the argument if it is an integer of this range."""
    require(isinstance(value, int) and not isinstance(value, bool), f"{value!r} is not an integer")
    require(low <= value <= high, f"{value} is not between {low} and {high}")
    return value


def integers(values: Any, low: int = -MAX_SIZE, high: int = MAX_SIZE) -> tuple[int, ...]:
    """Returns the argument if it is a list of integers of this range; a single one is a list of one."""
    if not isinstance(values, tuple | list):
        values = (values,)
    return tuple(integer(value, low, high) for value in values)


def number(value: Any) -> Any:
    """Returns the argument if it is a number, known or brought by the caller."""
    require(isinstance(value, bool | int | float | Number), f"{value!r} is not a number")
    return value


def numbers(*values: Any) -> None:
    """Refuses what is not a number."""
    for value in values:
        number(value)


def flags(*values: Any) -> None:
    """Refuses what is neither True nor False."""
    for value in values:
        flag(value)


def flag(value: Any) -> bool:
    """Returns the argument if it is True or False."""
    require(isinstance(value, bool), f"{value!r} is neither true nor false")
    return value


def one_of(value: Any, allowed: Sequence[Any]) -> Any:
    """Returns the argument if it is one of these."""
    require(any(value == item and type(value) is type(item) for item in allowed), f"{value!r} is none of {allowed}")
    return value


def axis(value: Any, rank: int) -> int:
    """Returns a dimension counted from the front; a tensor without dimensions has one to name."""
    rank = max(rank, 1)
    return integer(value, -rank, rank - 1) % rank


def axes(values: Any, rank: int) -> tuple[int, ...]:
    """Returns dimensions counted from the front, each once."""
    if not isinstance(values, tuple | list):
        values = (values,)
    found = tuple(axis(value, rank) for value in values)
    require(len(set(found)) == len(found), f"{tuple(values)} names a dimension twice")
    return found


def sizes(values: Any) -> tuple[int, ...]:
    """Returns a shape."""
    return integers(values, 0)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape that these shapes have in common, by torch's rules of broadcasting."""
    rank = max(map(len, shapes), default=0)
    result = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                require(result[at] in (1, size), f"the shapes {shapes} do not broadcast")
                result[at] = size
    return tuple(result)
