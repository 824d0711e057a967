"""The memory that the results of a program take: what each operation finds alive, read off the program.

A program is a straight line of operations with literal shapes, and a result is freed after its last use. So what is in
memory is known exactly before anything runs, but for what an operator takes for itself while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffkiln.program.convolutions import is_convolution
from diffkiln.program.ir import Op, Program, Ref, refs
from diffkiln.program.operators import OPERATORS, nbytes


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
    """Returns what the results of a program take at most. `inside` is that of `memory_of`."""
    peak = Peak(0, "")
    for index, now in enumerate(memory_of(program, inside)):
        if now > peak.nbytes:
            peak = Peak(now, f"program {program.name!r}, operation {index} ({program.ops[index].name})")
    return peak


def memory_of(program: Program, inside: Callable[[Op], int] = lambda _op: 0) -> Iterator[int]:
    """Yields, for each operation of a program, the bytes of results that are in memory while it runs.

    Results are freed after their last use. Inputs, weights and constants are not counted: they are there before the
    run. `inside` gives what an operation that calls another program takes while it runs, that program's own results
    included.
    """
    size, leaving = _lifetimes(program)
    held = 0
    for index, op in enumerate(program.ops):
        during = held + inside(op)
        held += sum(size.get(name, 0) for name in op.outputs)
        yield max(during, held)
        held -= sum(size[name] for name in leaving[index])


def workspace(op: Op, program: Program) -> int:
    """Returns what an operator of a CPU takes while it runs, its results included; 0 for most, which take no more.

    A convolution copies its input and its weight into the order of its kernel, and its result back. Source: oneDNN,
    "Understanding Memory Formats".
    """
    if not is_convolution(op):
        return 0
    results = sum(nbytes(program.types[name]) for name in op.outputs)
    return 2 * results + sum(nbytes(program.types[ref.name]) for ref in op.uses)


def _lifetimes(program: Program) -> tuple[dict[str, int], list[list[str]]]:
    """Returns the bytes of each result that has memory of its own, and which of them end with each operation."""
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
    return size, leaving


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
