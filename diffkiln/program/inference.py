"""The types of a program's values, inferred from those of its inputs.

Everything is known before anything runs: shapes are literals, and operators are those of the closed list. So a program
that declares another type than the one that it computes is refused, and what it needs is compared with what the user
allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkiln.errors import VerifyError
from diffkiln.program.ir import (
    ATTENTION,
    NOISE,
    SHARED,
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
from diffkiln.program.operators import OPERATORS, SIZES, Number, Refused
from diffkiln.program.operators.collectives import shared_results
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


def result_types(op: Op, types: Mapping[str, TensorType | None]) -> tuple[TensorType, ...]:
    """Returns the types of an operation's results from those of the values that it takes; None is that of a number.

    Raises:
        VerifyError: the operation does not take such values.
    """
    values: dict[str, _Value] = {name: Number() if type_ is None else type_ for name, type_ in types.items()}
    return _results(op, values, f"operation {op.name}")


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
        raise VerifyError(f"{where} is refused: its arguments do not fit the operator: {error}") from None
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
    """Returns the types of what is not an operator. `verify_types` has compared calls with what they call."""
    given = [values[ref.name] for ref in refs(op.args)]
    if op.name == NOISE:
        return (TensorType(op.attrs["dtype"], tuple(op.attrs["shape"])),)
    if op.name == STEP and isinstance(given[0], TensorType):
        return (given[0],)
    if op.name in SHARED:
        return shared_results(op.name, [_declared(value) for value in given], op.attrs)
    if op.name == ATTENTION:
        query, key, value = given
        if not (isinstance(query, TensorType) and isinstance(key, TensorType) and isinstance(value, TensorType)):
            raise Refused("attention takes tensors")
        return (attended(query, key, value),)
    return tuple(_declared(values[name]) for name in op.outputs)


def _declared(value: _Value) -> TensorType:
    if isinstance(value, Number):
        raise Refused("a number of the caller is not a result")
    return value
