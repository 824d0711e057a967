"""The bytes that processes exchange in a call, read off its program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from diffkiln.program.ir import ALL_TO_ALL, CALL, EXCHANGES, STEP, Module, Op, Program
from diffkiln.program.operators import nbytes


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What one process sends to others: `nbytes` in `count` exchanges."""

    nbytes: int = 0
    count: int = 0

    def __add__(self, other: Exchanged) -> Exchanged:
        return Exchanged(self.nbytes + other.nbytes, self.count + other.count)


def exchanged(call: Program, modules: Mapping[str, Module]) -> list[Exchanged]:
    """Returns what one process sends in each denoising step of a call, and last what it sends after the last step.

    Every process sends as much, but for what one alone gives to all, the first or one that runs a range of layers,
    which counts as well. What is drawn once for all, which is noise, is not counted, nor is the check at the beginning
    that all processes were asked for the same.

    Args:
        call: of a pipeline. One that does not mark its steps has one entry.
        modules: the components that it calls.
    """
    found = [Exchanged()]
    for op in call.ops:
        found[-1] = sum(_within(op, call, modules), found[-1])
        if op.name == STEP:
            found.append(Exchanged())
    return found


def sent(op: Op, program: Program) -> int:
    """Returns the bytes that one process sends to others in one of EXCHANGES, where it is one that sends."""
    count, size = op.attrs["count"], sum(nbytes(program.types[ref.name]) for ref in op.uses)
    return size // count * (count - 1) if op.name == ALL_TO_ALL else size * (count - 1)


def _within(op: Op, program: Program, modules: Mapping[str, Module]) -> Iterator[Exchanged]:
    if op.name in EXCHANGES:
        yield Exchanged(sent(op, program), 1)
    elif op.name == CALL:
        callee = modules[op.attrs["component"]].programs[op.attrs["program"]]
        for inner in callee.ops:
            yield from _within(inner, callee, modules)
