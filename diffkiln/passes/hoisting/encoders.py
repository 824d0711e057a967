"""Components that are called with constants alone, such as a text encoder with a prompt that the spec fixes: what they
give becomes tables of the bundle, and a component that nothing else calls leaves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffkiln.program import CALL, REGION, Builder, Module, Op, Program, Ref, fingerprint, prune
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Evaluation, Fold


@dataclass(frozen=True)
class Encoded:
    """A component and the calls of a pipeline, once its calls with constants are evaluated when the bundle is made.

    Attributes:
        calls: the programs of each variant.
        module: the component with the programs that are still called; None if there are none.
        folds: what is evaluated when the bundle is made.
    """

    calls: list[dict[str, Program]]
    module: Module | None
    folds: tuple[Fold, ...]


def encoded_ahead(
    calls: Sequence[Mapping[str, Program]], module: Module, constants: Constants, keep_originals: bool = False
) -> Encoded:
    """Returns a component and its calls, of which those that take constants alone are evaluated ahead.

    Args:
        calls: the programs of each variant.
        module: the component.
        constants: get a key for each value that is evaluated when the bundle is made.
        keep_originals: have weights stay in the bundle that nothing reads any more.
    """
    caller = _Caller(module, constants)
    changed = [{name: caller.rewritten(call) for name, call in programs.items()} for programs in calls]
    every = [op for programs in changed for call in programs.values() for op in call.ops if op.name == CALL]
    called = {op.attrs["program"] for op in every if op.attrs["component"] == module.component}
    return Encoded(changed, _left(module, called), caller.folds(keep_originals))


def _left(module: Module, called: set[str]) -> Module | None:
    """Returns the component with the programs that are called, and the regions that these call."""
    programs = {name: program for name, program in module.programs.items() if name in called}
    inside = {op.attrs["region"] for program in programs.values() for op in program.ops if op.name == REGION}
    regions = {name: region for name, region in module.regions.items() if name in inside}
    return replace(module, programs=programs, regions=regions) if programs else None


@dataclass
class _Table:
    program: Program
    evaluations: dict[Evaluation, None] = field(default_factory=dict)


class _Caller:
    """The rewriting of calls, which collects what is to be evaluated.

    Args:
        module: the component.
        constants: get a key for each value.
    """

    def __init__(self, module: Module, constants: Constants) -> None:
        self._module, self._constants = module, constants
        self._tables: dict[str, _Table] = {}

    def folds(self, keeps: bool) -> tuple[Fold, ...]:
        """Returns what is evaluated when the bundle is made."""
        component, regions = self._module.component, self._module.regions
        return tuple(
            Fold(component, each.program, regions, tuple(each.evaluations), keeps) for each in self._tables.values()
        )

    def rewritten(self, call: Program) -> Program:
        """Returns the call with constants in the place of what the component makes of constants."""
        edit = Builder(call)
        for at, op in enumerate(call.ops):
            if op.name == CALL and op.attrs["component"] == self._module.component and _takes_constants(op):
                self._fold(edit, at, op)
        return edit.build()

    def _fold(self, edit: Builder, at: int, op: Op) -> None:
        used = set(edit.program.uses())
        results = [(name, index) for index, name in enumerate(op.outputs) if name in used]
        program = self._module.programs[op.attrs["program"]]
        part = prune(replace(program, outputs=tuple(program.outputs[index] for _, index in results), signature={}))
        if not all(ref.name in part.makers() for ref in part.outputs):
            return
        edit.replace(at)
        for (name, _), ref in zip(results, self._evaluated(edit, part, op.uses), strict=True):
            edit.replace_uses(name, ref)

    def _evaluated(self, edit: Builder, part: Program, args: Sequence[Ref]) -> list[Ref]:
        """Returns the constants that the program gives for these."""
        mark, takes = fingerprint(part), tuple(ref.bare for ref in args)
        stem = "/".join((self._module.component, mark, *takes))
        names = [ref.name for ref in part.outputs]
        keys = {name: self._constants.add_later(f"{stem}/{name}", part.types[name]) for name in names}
        table = self._tables.setdefault(mark, _Table(part))
        table.evaluations[Evaluation(takes, tuple(keys[name] for name in names))] = None
        return [edit.constant(keys[name], part.types[name]) for name in names]


def _takes_constants(op: Op) -> bool:
    return all(ref.is_constant for ref in op.uses)
