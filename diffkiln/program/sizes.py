"""Programs that differ by sizes alone, as one program whose sizes follow its inputs'.

A program is recorded for fixed sizes, and holds them as numbers: in views, slices, new tensors. Where several programs
are the same but for those numbers, each number is found as an expression of the inputs' dimensions. It is true for all
the sizes that were recorded, each of which was looked at; for others it need not be.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from diffkiln.program.ir import Op, Program, TensorType
from diffkiln.program.serial import program_to_json

#: An input, by its position, and one of its dimensions.
Dimension = tuple[int, int]

#: Where a number stands: the operation, and the way from there through its arguments.
Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Expression:
    """A whole number: `factor` times the product of dimensions, plus `offset`."""

    dimensions: tuple[Dimension, ...]
    factor: Fraction = Fraction(1)
    offset: int = 0

    def of(self, size: Callable[[Dimension], Any]) -> Any:
        """Returns the number for the dimensions that `size` gives, which may be symbols."""
        value: Any = 1
        for dimension in self.dimensions:
            value = value * size(dimension)
        if self.factor.numerator != 1:
            value = value * self.factor.numerator
        if self.factor.denominator != 1:
            value = value // self.factor.denominator
        return value + self.offset if self.offset else value


@dataclass(frozen=True)
class Family:
    """Programs that differ by sizes alone.

    Attributes:
        members: the programs. Their inputs' sizes differ in the dimensions of `ranges`.
        ranges: the smallest and the largest size of each dimension that differs.
        sizes: the numbers that differ, by where they stand.
    """

    members: tuple[Program, ...]
    ranges: Mapping[Dimension, tuple[int, int]]
    sizes: Mapping[Path, Expression]

    def at(self, size: Callable[[Dimension], Any]) -> Program:
        """Returns the program with the numbers that belong to the input dimensions that `size` gives."""
        values = {path: expression.of(size) for path, expression in self.sizes.items()}
        ops = tuple(
            replace(
                op,
                args=_put(op.args, (index, "args"), values),
                kwargs={key: _put(arg, (index, key), values) for key, arg in op.kwargs.items()},
            )
            for index, op in enumerate(self.members[0].ops)
        )
        return replace(self.members[0], ops=ops)


def families(programs: Sequence[Program]) -> list[Family]:
    """Groups programs that differ only by sizes; each program is in one family.

    A dimension of one element stays what it is: many operators mean something else by it.
    """
    alike: dict[str, list[Program]] = {}
    for program in programs:
        alike.setdefault(_structural_key(program), []).append(program)
    found: list[Family] = []
    for members in alike.values():
        family = _unified(members) if len(members) > 1 else None
        found += [family] if family else [Family((member,), {}, {}) for member in members]
    return found


def _unified(members: Sequence[Program]) -> Family | None:
    """Returns the family of programs of one structural key; None where a number follows no dimension."""
    sizes: dict[Dimension, tuple[int, ...]] = {}
    for position, items in enumerate(zip(*(member.inputs for member in members), strict=True)):
        for dimension, given in enumerate(zip(*(item.type.shape for item in items), strict=True)):
            if len(set(given)) > 1:
                sizes[position, dimension] = given
    numbers: dict[Path, Expression] = {}
    for paths in zip(*(list(_numbers(member)) for member in members), strict=True):
        values = tuple(value for _, value in paths)
        if len(set(values)) > 1:
            expression = _expression(values, sizes)
            if expression is None:
                return None
            numbers[paths[0][0]] = expression
    ranges = {dimension: (min(given), max(given)) for dimension, given in sizes.items()}
    return Family(tuple(members), ranges, numbers)


def _expression(values: Sequence[int], sizes: Mapping[Dimension, tuple[int, ...]]) -> Expression | None:
    """Returns the simplest expression with these values: a dimension, a product of two, a multiple of one, or more."""
    distinct = {given: dimension for dimension, given in reversed(list(sizes.items()))}
    products: list[tuple[tuple[Dimension, ...], tuple[int, ...]]] = [((d,), given) for given, d in distinct.items()]
    for (a, left), (b, right) in itertools.combinations_with_replacement(list(products), 2):
        products.append(((*a, *b), tuple(x * y for x, y in zip(left, right, strict=True))))
    for fits in (_equal, _multiple, _shifted):
        for dimensions, given in products:
            if (found := fits(values, given)) is not None:
                return Expression(dimensions, *found)
    return None


def _equal(values: Sequence[int], given: Sequence[int]) -> tuple[Fraction, int] | None:
    return (Fraction(1), 0) if tuple(values) == tuple(given) else None


def _multiple(values: Sequence[int], given: Sequence[int]) -> tuple[Fraction, int] | None:
    factor = Fraction(values[0], given[0]) if given[0] else Fraction(0)
    return (factor, 0) if all(factor * x == y for x, y in zip(given, values, strict=True)) else None


def _shifted(values: Sequence[int], given: Sequence[int]) -> tuple[Fraction, int] | None:
    """Returns a multiple and a constant. The first two that differ decide it, and all must agree."""
    pairs = list(dict.fromkeys(zip(given, values, strict=True)))
    if len(pairs) < 2 or len({x for x, _ in pairs}) != len(pairs):
        return None
    (x0, y0), (x1, y1) = pairs[:2]
    factor = Fraction(y1 - y0, x1 - x0)
    offset = y0 - factor * x0
    if offset.denominator != 1 or any(factor * x + offset != y for x, y in pairs):
        return None
    return factor, int(offset)


# -- numbers and what is left without them --


def _numbers(program: Program) -> Iterator[tuple[Path, int]]:
    for index, op in enumerate(program.ops):
        yield from _within(op.args, (index, "args"))
        for key in sorted(op.kwargs):
            yield from _within(op.kwargs[key], (index, key))


def _within(arg: Any, path: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(arg, tuple):
        for index, item in enumerate(arg):
            yield from _within(item, (*path, index))
    elif isinstance(arg, int) and not isinstance(arg, bool):
        yield path, arg


def _put(arg: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    if isinstance(arg, tuple):
        return tuple(_put(item, (*path, index), values) for index, item in enumerate(arg))
    return values.get(path, arg)


def _structural_key(program: Program) -> str:
    """Returns what programs that differ only by sizes have in common."""

    def bare(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(map(bare, arg))
        return 0 if isinstance(arg, int) and not isinstance(arg, bool) else arg

    def bare_op(op: Op) -> Op:
        return replace(op, args=bare(op.args), kwargs={key: bare(arg) for key, arg in op.kwargs.items()})

    kept = {f"@{name}" for name in program.weights} | {f"#{key}" for key in program.constants}
    types = {
        name: type_ if name in kept else TensorType(type_.dtype, tuple(min(size, 2) for size in type_.shape))
        for name, type_ in program.types.items()
    }
    inputs = tuple(replace(item, type=types[item.name]) for item in program.inputs)
    ops = tuple(map(bare_op, program.ops))
    data = program_to_json(replace(program, name="", inputs=inputs, ops=ops, types=types, signature={}))
    return json.dumps(data, sort_keys=True)
