"""Runs of operators, one after the other, as regions of their own. Runs that compute the same share one.

A run's region takes everything as an input: values, weights, constants and, where asked, numbers. So the runs of all
the steps of a denoising loop, which differ by their constants, are one region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from diffkiln.interpreter.aten import overload
from diffkiln.program import REGION, Builder, Module, Op, Program, Ref, fingerprint

#: An engine is worth its call where it fuses at least this many operators that compute.
_WORTH = 2

#: A number among an operator's arguments as a value, where that computes the same; else None.
Lift = Callable[[Builder, Op, float], Ref | None]


def between_blocks(module: Module) -> Module:
    """Returns the component with its runs of operators as regions, beside those of its blocks."""
    segments = Segments("between", lambda name: (REGION, {"region": name, "instance": ""}))
    programs = {name: segments.outlined(program, range(len(program.ops))) for name, program in module.programs.items()}
    return replace(module, programs=programs, regions={**module.regions, **segments.regions})


class Segments:
    """The regions that runs of several programs became.

    Args:
        stem: of the regions' names.
        caller: the name of a region → the operation that calls it, and its attributes.
        lift: makes inputs of numbers.

    Attributes:
        regions: by name.
    """

    def __init__(
        self, stem: str, caller: Callable[[str], tuple[str, dict[str, str]]], lift: Lift | None = None
    ) -> None:
        self.regions: dict[str, Program] = {}
        self._stem, self._caller, self._lift = stem, caller, lift
        self._known: dict[str, str] = {}

    def outlined(self, program: Program, where: range, fixed: Callable[[Op], bool] = lambda op: False) -> Program:
        """Returns the program with a call instead of each run within `where` that is worth an engine.

        `fixed` operations stay as they are.
        """
        may = [at for at in where if program.ops[at].is_aten and not fixed(program.ops[at])]
        segments = [run for run in _segments(may) if sum(_computes(program.ops[at]) for at in run) >= _WORTH]
        if self._lift:
            program = _lifted(program, segments, self._lift)
        edit = Builder(program)
        for run in segments:
            edit.outline(run, lambda region: self._caller(self._name(region)))
        return edit.build()

    def _name(self, program: Program) -> str:
        mark = fingerprint(program)
        if mark not in self._known:
            count = len(self.regions) + 1
            name = self._known[mark] = self._stem if count == 1 else f"{self._stem}-{count}"
            self.regions[name] = replace(program, name=name)
        return self._known[mark]


def _lifted(program: Program, segments: Sequence[Sequence[int]], lift: Lift) -> Program:
    """Returns the program with values in the place of the runs' numbers, where those compute the same."""
    edit = Builder(program)
    for at in (at for run in segments for at in run):
        op = program.ops[at]
        args = [(lift(edit, op, arg) or arg) if isinstance(arg, float) else arg for arg in op.args]
        edit.replace(at, replace(op, args=tuple(args)))
    return edit.build()


def _segments(positions: Iterable[int]) -> list[list[int]]:
    """Places that follow each other, in lists as long as can be."""
    segments: list[list[int]] = []
    for position in positions:
        if segments and segments[-1][-1] == position - 1:
            segments[-1].append(position)
        else:
            segments.append([position])
    return segments


def _computes(op: Op) -> bool:
    """Returns True if an operation does more than give a view of its argument."""
    return not any(result.alias_info for result in overload(op.name)._schema.returns)


def is_number_of(op: Op, wanted: Any) -> bool:
    """Returns True if an operator takes this number where it takes a tensor, beside one that decides the type."""
    schema = overload(op.name)._schema
    kinds = [str(argument.type) for argument in schema.arguments]
    return any(arg is wanted and kind == "Tensor" for arg, kind in zip(op.args, kinds, strict=False))
