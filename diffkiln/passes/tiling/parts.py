"""The parts of a program that weights work on apart from each other: its tiles, or the images of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln.program import REGION, Op, Program, TensorType, map_refs
from diffkiln.program.ir import Ref


@dataclass(frozen=True)
class Part:
    """Operations that need each other, up to the last that reads weights.

    Attributes:
        positions: in the program.
        inputs, outputs: what they take of the rest of the program, and what it takes of them, in order.
        form: equal for two parts that compute the same of other inputs.
    """

    positions: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    form: str


def parts_of(program: Program) -> list[Part]:
    """Returns the parts of a program in their order; one where everything hangs together.

    Operations before the first weights, such as slices of an input, belong to no part; neither do those after the last
    ones, such as the blending of tiles.
    """
    works = _works(program)
    sets = _Sets()
    maker = {name: at for at, op in enumerate(program.ops) for name in op.outputs}
    for at in works:
        for ref in program.ops[at].uses:
            if maker.get(ref.name) in works:
                sets.join(at, maker[ref.name])
    found: dict[int, list[int]] = {}
    for at in sorted(works):
        found.setdefault(sets.first(at), []).append(at)
    return [part_at(program, positions) for positions in found.values()]


def _works(program: Program) -> set[int]:
    """Returns the places of the operations between the first weights and the last ones, on the way of an input."""
    read: set[str] = set()  # values that weights have worked on
    reached = {item.name for item in program.inputs}
    after: set[int] = set()
    for at, op in enumerate(program.ops):
        given = {ref.name for ref in op.uses}
        if given.isdisjoint(reached):
            continue
        reached.update(op.outputs)
        if _reads_weights(op) or not given.isdisjoint(read):
            read.update(op.outputs)
            after.add(at)
    needed: set[str] = set()
    works: set[int] = set()
    for at in sorted(after, reverse=True):
        op = program.ops[at]
        if _reads_weights(op) or not needed.isdisjoint(op.outputs):
            works.add(at)
            needed.update(ref.name for ref in op.uses)
    return works


def _reads_weights(op: Op) -> bool:
    return op.name == REGION or any(ref.name.startswith("@") for ref in op.uses)


class _Sets:
    """Sets of numbers that are joined."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def first(self, number: int) -> int:
        """Returns the number that stands for a number's set."""
        path = [number]
        while (above := self._above.get(path[-1], path[-1])) != path[-1]:
            path.append(above)
        self._above |= dict.fromkeys(path[:-1], path[-1])
        return path[-1]

    def join(self, one: int, other: int) -> None:
        self._above[self.first(one)] = self.first(other)


def part_at(program: Program, positions: Sequence[int]) -> Part:
    """Returns the operations at some places as a part. Constants are inputs, so parts may differ in them."""
    chosen = set(positions)
    ops = [program.ops[at] for at in positions]
    made = {name for op in ops for name in op.outputs}
    taken_in = (ref.name for op in ops for ref in op.uses if not ref.name.startswith("@"))
    inputs = dict.fromkeys(name for name in taken_in if name not in made)
    others = (op for at, op in enumerate(program.ops) if at not in chosen)
    taken = {ref.name for op in others for ref in op.uses} | {ref.name for ref in program.outputs}
    outputs = tuple(name for op in ops for name in op.outputs if name in taken)
    return Part(tuple(positions), tuple(inputs), outputs, _form(ops, tuple(inputs), outputs, program.types))


def _form(ops: Sequence[Op], inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, TensorType]) -> str:
    """Returns operations as a text in which values are numbered, with the types of what they take."""
    numbers = {name: f"%in.{index}" for index, name in enumerate(inputs)}

    def numbered(arg: Any) -> Any:
        return map_refs(arg, lambda ref: Ref(numbers.get(ref.name, ref.name)))

    lines = [str(types[name]) for name in inputs]
    for op in ops:
        numbers |= {name: f"%{len(numbers) + index}" for index, name in enumerate(op.outputs)}
        options = sorted(numbered(op.kwargs).items()), sorted(op.attrs.items())
        lines.append(repr((op.name, numbered(op.args), options, len(op.outputs))))
    return "\n".join([*lines, *(numbers[name] for name in outputs)])
