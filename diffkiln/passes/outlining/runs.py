"""Runs of operators, one after the other, as regions of their own. Runs that compute the same share one.

A run's region takes everything as an input: values, weights, constants and, where asked, numbers. So the runs of all
the steps of a denoising loop, which differ by their constants, are one region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffkiln.interpreter.aten import overload
from diffkiln.program import REGION, Arg, Input, Module, Op, Program, Ref, TensorType, fingerprint, map_refs, refs

#: An engine is worth its call where it fuses at least this many operators that compute.
_WORTH = 2

#: Makes the operation that calls a region by its name: (region, arguments, results) → operation.
Caller = Callable[[str, tuple[Ref, ...], tuple[str, ...]], Op]

#: A number among an operator's arguments as a value, where that computes the same; else None.
Lift = Callable[[Op, int | float], Ref | None]


def between_blocks(module: Module) -> Module:
    """The component with its runs of operators as regions, beside those of its blocks."""
    runs = Runs("between", lambda name, args, results: Op(REGION, args, results, attrs=_region(name)))
    programs = {name: runs.outlined(program, range(len(program.ops))) for name, program in module.programs.items()}
    return replace(module, programs=programs, regions={**module.regions, **runs.regions})


def _region(name: str) -> dict[str, str]:
    return {"region": name, "instance": ""}


class Runs:
    """The regions that runs of several programs became.

    Args:
        stem: of the regions' names.
        caller: makes the operation that takes a run's place.
        lift: makes inputs of numbers.

    Attributes:
        regions: by name.
    """

    def __init__(self, stem: str, caller: Caller, lift: Lift | None = None) -> None:
        self.regions: dict[str, Program] = {}
        self._stem, self._caller, self._lift = stem, caller, lift
        self._known: dict[str, str] = {}

    def outlined(self, program: Program, where: range, fixed: Callable[[Op], bool] = lambda op: False) -> Program:
        """The program with a call in the place of each run within `where` that is worth one. `fixed` operations stay
        as they are."""
        ops: list[Op] = []
        types = dict(program.types)
        for run in _runs(program, where, fixed):
            if sum(map(_computes, run)) < _WORTH:
                ops += run
                continue
            inside = {id(op) for op in run}
            outside = [op for op in program.ops if id(op) not in inside]
            read = {ref.name for op in outside for ref in refs((op.args, op.kwargs))}
            read |= {ref.name for ref in program.outputs}
            results = tuple(name for op in run for name in op.outputs if name in read)
            region, args = self._region(run, results, types)
            ops.append(self._caller(region, args, results))
        named = {name for op in ops for name in op.outputs} | {item.name for item in program.inputs}
        done = replace(program, ops=tuple(ops))
        kept = named | set(done.uses())
        return replace(done, types={name: type_ for name, type_ in types.items() if name in kept})

    def _region(
        self, run: Sequence[Op], results: Sequence[str], types: dict[str, TensorType]
    ) -> tuple[str, tuple[Ref, ...]]:
        """The name of the region that computes a run, and what it is called with here."""
        made = {name: f"%{index}" for index, name in enumerate(name for op in run for name in op.outputs)}
        taken: dict[str, str] = {}
        args: list[Ref] = []

        def value(ref: Ref) -> Ref:
            if ref.name in made:
                return Ref(made[ref.name])
            if ref.name not in taken:
                taken[ref.name] = f"%in.{len(taken)}"
                args.append(ref)
            return Ref(taken[ref.name])

        def own(op: Op, arg: Arg) -> Arg:
            if self._lift and isinstance(arg, float) and (lifted := self._lift(op, arg)):
                types[lifted.name] = TensorType("float64", ())
                return value(lifted)
            return map_refs(arg, value)

        ops = tuple(
            replace(
                op,
                args=tuple(own(op, arg) for arg in op.args),
                kwargs=map_refs(op.kwargs, value),
                outputs=tuple(made[name] for name in op.outputs),
            )
            for op in run
        )
        inputs = tuple(Input(taken[ref.name], types[ref.name]) for ref in args)
        kinds = {item.name: item.type for item in inputs} | {new: types[old] for old, new in made.items()}
        program = Program("", inputs, ops, tuple(Ref(made[name]) for name in results), kinds)
        return self._name(program), tuple(args)

    def _name(self, program: Program) -> str:
        mark = fingerprint(program)
        if mark not in self._known:
            count = len(self.regions) + 1
            name = self._known[mark] = self._stem if count == 1 else f"{self._stem}-{count}"
            self.regions[name] = replace(program, name=name)
        return self._known[mark]


def _runs(program: Program, where: range, fixed: Callable[[Op], bool]) -> Iterator[list[Op]]:
    """The operations in order, those that may be outlined together in lists as long as can be, others alone."""
    run: list[Op] = []
    for index, op in enumerate(program.ops):
        if index in where and op.is_aten and not fixed(op):
            run.append(op)
            continue
        if run:
            yield run
        run = []
        yield [op]
    if run:
        yield run


def _computes(op: Op) -> bool:
    """Whether an operation does more than look at its argument in another way."""
    return op.is_aten and not any(result.alias_info for result in overload(op.name)._schema.returns)


def is_number_of(op: Op, wanted: Any) -> bool:
    """Whether an operator takes this argument in the place of a tensor, beside one that decides the result's type."""
    schema = overload(op.name)._schema
    kinds = [str(argument.type) for argument in schema.arguments]
    return any(arg is wanted and kind == "Tensor" for arg, kind in zip(op.args, kinds, strict=False))
