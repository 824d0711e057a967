"""The types of a program's values, inferred from those of its inputs, and the memory that a run takes.

Everything is known before anything runs: shapes are literals, and operators are those of the closed list. So a program
that declares another type than the one that it computes is refused, and what it needs is compared with what the user
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffkiln.errors import VerifyError
from diffkiln.program.ir import (
    ATTENTION,
    NOISE,
    STEP,
    Device,
    DType,
    Layout,
    MemoryFormat,
    Op,
    Program,
    Ref,
    TensorType,
    refs,
)
from diffkiln.program.operators import OPERATORS, SIZES, Number, Refused, nbytes
from diffkiln.program.operators.products import attended

#: How long a text and a list among the arguments may be, far above any recorded ones.
MAX_TEXT, MAX_LIST = 200, 2**16

_Value = TensorType | Number


def infer_types(program: Program) -> None:
    """Compares the type of every value with the one that its operation gives.

    `program` is verified, and so are the calls in it: `verify_types` compares these with their callees.

    Raises:
        VerifyError: names the operation, and the type that it has against the one that it declares.
    """
    for name, type_ in program.types.items():
        _check_type(name, type_, program)
    values: dict[str, _Value] = dict(program.types)
    for item in program.inputs:
        if item.source.get("kind") == "scalar":
            values[item.name] = Number()
    for index, op in enumerate(program.ops):
        where = f"program {program.name!r}, operation {index} ({op.name})"
        for name, found in zip(op.outputs, _results(op, values, where), strict=True):
            if found != program.types[name]:
                raise VerifyError(f"{where}: {name} is declared as {program.types[name]}, it is {found}")


def _check_type(name: str, type_: TensorType, program: Program) -> None:
    if type_.dtype not in SIZES:
        raise VerifyError(f"program {program.name!r}: {name} is of the dtype {type_.dtype!r}, which no value has")
    if len(type_.shape) > 64:
        raise VerifyError(f"program {program.name!r}: {name} has {len(type_.shape)} dimensions; the limit is 64")


def _results(op: Op, values: Mapping[str, _Value], where: str) -> tuple[TensorType, ...]:
    try:
        if not op.is_aten:
            return _special(op, values)
        args = tuple(_argument(arg, values) for arg in op.args)
        kwargs = {key: _argument(arg, values) for key, arg in op.kwargs.items()}
        found = OPERATORS[op.name].infer(*args, **kwargs)
    except Refused as reason:
        raise VerifyError(f"{where} is refused: {str(reason)[:300]}") from None
    except TypeError as error:
        raise VerifyError(f"{where} is refused: its arguments are not those of the operator: {error}") from None
    results = (found,) if isinstance(found, TensorType) else tuple(found)
    if len(results) != len(op.outputs):
        raise VerifyError(f"{where}: it gives {len(results)} values, and {len(op.outputs)} are named")
    return results


def _argument(arg: Any, values: Mapping[str, _Value]) -> Any:
    """Returns an argument with types in the place of values."""
    if isinstance(arg, Ref):
        return values[arg.name]
    if isinstance(arg, tuple | list):
        if len(arg) > MAX_LIST:
            raise Refused(f"a list of {len(arg)} arguments; the limit is {MAX_LIST}")
        return tuple(_argument(item, values) for item in arg)
    if isinstance(arg, str) and len(arg) > MAX_TEXT:
        raise Refused(f"a text of {len(arg)} characters; the limit is {MAX_TEXT}")
    if isinstance(arg, int) and not -(2**63) <= arg < 2**63:
        raise Refused("an integer of more than 64 bits")
    if isinstance(arg, DType) and arg.name not in SIZES:
        raise Refused(f"no value has the dtype {arg.name!r}")
    if arg is None or isinstance(arg, bool | int | float | str | DType | Device | Layout | MemoryFormat):
        return arg
    raise Refused(f"an argument of the kind {type(arg).__name__}")


def _special(op: Op, values: Mapping[str, _Value]) -> tuple[TensorType, ...]:
    """Returns the types of what is no operator. `verify_types` has compared calls with what they call."""
    given = [values[ref.name] for ref in refs(op.args)]
    if op.name == NOISE:
        return (TensorType(op.attrs["dtype"], tuple(op.attrs["shape"])),)
    if op.name == STEP and isinstance(given[0], TensorType):
        return (given[0],)
    if op.name == ATTENTION:
        query, key, value = given
        if not (isinstance(query, TensorType) and isinstance(key, TensorType) and isinstance(value, TensorType)):
            raise Refused("attention takes tensors")
        return (attended(query, key, value),)
    return tuple(_declared(values[name]) for name in op.outputs)


def _declared(value: _Value) -> TensorType:
    if isinstance(value, Number):
        raise Refused("a number that the caller brings is no result")
    return value


# -- memory --


def _named(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


#: Operators that give the memory of their argument, if its elements lie in their order.
_MAYBE_VIEWS = _named("reshape.default view.default contiguous.default flatten.using_ints ravel.default") | _named(
    "view_as.default reshape_as.default"
)
#: The same, if their argument has the type that is asked for.
_CASTS = _named("to.dtype to.device to.other to.dtype_layout type_as.default")
#: Views that keep the order of elements.
_DENSE = _named("unsqueeze.default squeeze.default squeeze.dim squeeze.dims unflatten.int alias.default detach.default")
_KEEPS_ORDER = _DENSE | _MAYBE_VIEWS | _CASTS


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes of results that a run of a program holds at once, and the operation that is running then."""

    nbytes: int
    where: str


def peak_memory(program: Program, inside: Callable[[Op], int] = lambda _op: 0) -> Peak:
    """Returns what the results of a program take at most, freed after their last use.

    Inputs, weights and constants are not counted: they are there before the run. `inside` gives what a call takes
    while it runs.
    """
    last = _last_uses(program)
    owner: dict[str, str] = {}  # a value → the value whose memory it shares
    dense: set[str] = set(program.types) - {name for op in program.ops for name in op.outputs}
    size: dict[str, int] = {}
    ends: dict[str, int] = {}
    for index, op in enumerate(program.ops):
        base = _shared(op, program, dense)
        for name in op.outputs:
            whole = owner.get(base, base) if base else name
            owner[name] = whole
            if whole == name:
                size[name] = nbytes(program.types[name])
            ends[whole] = max(ends.get(whole, index), last.get(name, index))
            if base is None or (base in dense and op.name in _KEEPS_ORDER):
                dense.add(name)
    leaving: list[list[str]] = [[] for _ in program.ops]
    for name in size:
        if ends[name] < len(program.ops):
            leaving[ends[name]].append(name)
    held, peak = 0, Peak(0, "")
    for index, op in enumerate(program.ops):
        held += sum(size.get(name, 0) for name in op.outputs)
        now = held + inside(op)
        if now > peak.nbytes:
            peak = Peak(now, f"program {program.name!r}, operation {index} ({op.name})")
        held -= sum(size[name] for name in leaving[index])
    return peak


def _last_uses(program: Program) -> dict[str, int]:
    last: dict[str, int] = {}
    for index, op in enumerate(program.ops):
        for ref in refs((op.args, op.kwargs)):
            last[ref.name] = index
    for ref in program.outputs:
        last[ref.name] = len(program.ops)
    return last


def _shared(op: Op, program: Program, dense: set[str]) -> str | None:
    """Returns the value whose memory the results share; None if they have memory of their own."""
    first = op.args[0] if op.args else None
    if not op.is_aten or not isinstance(first, Ref):
        return None
    if OPERATORS[op.name].view:
        return first.name
    if op.name in _MAYBE_VIEWS and first.name in dense:
        return first.name
    same = op.name in _CASTS and program.types[first.name] == program.types[op.outputs[0]]
    return first.name if same else None
