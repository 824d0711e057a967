"""One evaluation for all steps, where there was one for each: a program whose rows are those of several calls.

The first dimension of every value are the rows of a batch. A program that computes each row by itself can be given the
rows of several calls one after the other, and gives those of their results. A product then reads its weights once. The
rows differ from those of a call alone by rounding, since a product of more rows may add in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffkiln.errors import VerifyError
from diffkiln.passes.sequencing.rules import POINTWISE
from diffkiln.program import REGION, Op, Program, TensorType, written_anew
from diffkiln.program.inference import result_types

#: Operators along dimensions, by the position of the argument that names one or several.
_ALONG = {
    "aten.amax.default": 1, "aten.amin.default": 1, "aten.cat.default": 1, "aten.chunk.default": 2, "aten.mean.dim": 1,
    "aten.select.int": 1, "aten.slice.Tensor": 1, "aten.softmax.int": 1, "aten.split.Tensor": 2,
    "aten.split_with_sizes.default": 2, "aten.squeeze.dim": 1, "aten.sum.dim_IntList": 1, "aten.unbind.int": 1,
    "aten.unflatten.int": 1, "aten.unsqueeze.default": 1,
}  # fmt: skip
#: Operators on the last dimensions, as many as their second argument has.
_NORMALIZED = frozenset(("aten.layer_norm.default", "aten.rms_norm.default"))
#: Operators whose second argument is the shape of the result.
_SHAPED = frozenset(("aten._unsafe_view.default", "aten.expand.default", "aten.reshape.default", "aten.view.default"))
_EXPAND = "aten.expand.default"
#: Products of rows and a matrix of weights.
_LAYERS = frozenset(("aten.linear.default", "aten.matmul.default", "aten.mm.default"))


class RowsMeet(Exception):
    """An operation does not compute each row by itself, or it is not known to."""


class Batch:
    """Programs of a component for the rows of several calls.

    Args:
        regions: of the component.
        count: of calls.

    Attributes:
        regions: those that the programs call, by name.
    """

    def __init__(self, regions: Mapping[str, Program], count: int) -> None:
        self._before, self._count = regions, count
        self.regions: dict[str, Program] = {}

    def program(self, program: Program) -> Program:
        """Returns a program that takes and gives the rows of all calls.

        Raises:
            RowsMeet: a row of the results may follow other rows of the inputs.
        """
        types = {name: type_ for name, type_ in program.types.items() if not name.startswith("%")}
        types |= {item.name: self._grown(item.type) for item in program.inputs}
        rows = {item.name for item in program.inputs}
        ops: list[Op] = []
        for op in program.ops:
            if rows.isdisjoint(ref.name for ref in op.uses):
                types |= {name: program.types[name] for name in op.outputs}
            else:
                op = self._op(op, program.types, rows)
                types |= {name: self._grown(program.types[name]) for name in op.outputs}
                _require_types(op, types)
                rows.update(op.outputs)
            ops.append(op)
        if not rows.issuperset(ref.name for ref in program.outputs):
            raise RowsMeet(f"{program.name} gives what follows no row")
        named = replace(program, name=f"{program.name}.{self._count}-calls")
        return written_anew(named, ops, types, program.outputs)

    def _op(self, op: Op, types: Mapping[str, TensorType], rows: set[str]) -> Op:
        """Returns an operation on the rows of all calls."""
        if op.name == REGION:
            if not rows.issuperset(ref.name for ref in op.uses):
                raise RowsMeet(f"{op.attrs['region']} is given what follows no row")
            return replace(op, attrs={**op.attrs, "region": self._region(op.attrs["region"])})
        if op.name in _SHAPED:
            return self._shaped(op, types)
        if _element_by_element(op, types, rows) or _keeps_rows(op, types, rows):
            return op
        raise RowsMeet(f"{op.name} is not known to compute each row by itself")

    def _region(self, name: str) -> str:
        made = self.program(self._before[name])
        self.regions[made.name] = made
        return made.name

    def _shaped(self, op: Op, types: Mapping[str, TensorType]) -> Op:
        (source, *_), (result,) = op.uses, op.outputs
        shape = types[result].shape
        if not shape or types[source.name].shape[:1] != shape[:1]:
            raise RowsMeet(f"{op.name} has other rows than its argument")
        if op.name == _EXPAND and len(types[source.name].shape) != len(shape):
            raise RowsMeet(f"{op.name} puts dimensions before the rows")
        return replace(op, args=(source, (shape[0] * self._count, *shape[1:]), *op.args[2:]))

    def _grown(self, type_: TensorType) -> TensorType:
        if not type_.shape:
            raise RowsMeet("a number has no rows")
        return replace(type_, shape=(type_.shape[0] * self._count, *type_.shape[1:]))


def _element_by_element(op: Op, types: Mapping[str, TensorType], rows: set[str]) -> bool:
    """Returns True if the elements of each row of the result are those of the same row, none of them broadcast."""
    (result,) = op.outputs[:1]
    shape = types[result].shape
    given = [types[ref.name].shape for ref in op.uses if ref.name in rows]
    return op.name in POINTWISE and all(len(own) == len(shape) and own[0] == shape[0] for own in given)


def _keeps_rows(op: Op, types: Mapping[str, TensorType], rows: set[str]) -> bool:
    """Returns True for a layer of rows of features, and for an operation along another dimension than the rows'."""
    values = list(op.uses)
    given = [ref for ref in values if ref.name in rows]
    rank = len(types[given[0].name].shape)
    if op.name in _LAYERS:
        return rank > 1 and given == [op.args[0]] and len(types[values[1].name].shape) == 2
    if op.name in _NORMALIZED:
        normalized: Any = op.args[1]
        return given == [op.args[0]] and len(normalized) < rank
    if op.name not in _ALONG or len(given) != len(values) or len(op.args) <= _ALONG[op.name]:
        return False
    named: Any = op.args[_ALONG[op.name]]
    dims = named if isinstance(named, list | tuple) else (named,)
    return bool(dims) and all(dim % (rank + (op.name == "aten.unsqueeze.default")) > 0 for dim in dims)


def _require_types(op: Op, types: Mapping[str, TensorType]) -> None:
    """Raises `RowsMeet` if an operation gives other types than those of all rows, as where rows are broadcast."""
    try:
        found = result_types(op, {name: types[name] for name in (*(ref.name for ref in op.uses), *op.outputs)})
    except VerifyError as error:
        raise RowsMeet(str(error)) from error
    if list(found) != [types[name] for name in op.outputs]:
        raise RowsMeet(f"{op.name} gives rows of another shape")
