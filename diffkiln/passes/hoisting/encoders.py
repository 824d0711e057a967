"""Components that are called with constants alone, such as a text encoder with a prompt that the spec fixes: what they
give becomes tables of the bundle, and a component that nothing else calls leaves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.hoisting.tables import Tables
from diffkiln.program import CALL, REGION, Builder, Module, Op, Program, fingerprint, prune
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Fold


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
    tables = Tables(module.component, constants)
    changed = [{name: _rewritten(call, module, tables) for name, call in programs.items()} for programs in calls]
    every = [op for programs in changed for call in programs.values() for op in call.ops if op.name == CALL]
    called = {op.attrs["program"] for op in every if op.attrs["component"] == module.component}
    return Encoded(changed, _left(module, called), tables.folds(module.regions, keep_originals))


def _left(module: Module, called: set[str]) -> Module | None:
    """Returns the component with the programs that are called, and the regions that these call."""
    programs = {name: program for name, program in module.programs.items() if name in called}
    inside = {op.attrs["region"] for program in programs.values() for op in program.ops if op.name == REGION}
    regions = {name: region for name, region in module.regions.items() if name in inside}
    return replace(module, programs=programs, regions=regions) if programs else None


def _rewritten(call: Program, module: Module, tables: Tables) -> Program:
    """Returns the call with constants in the place of what the component makes of constants."""
    edit = Builder(call)
    for at, op in enumerate(call.ops):
        if op.name == CALL and op.attrs["component"] == module.component and _takes_constants(op):
            _fold(edit, at, module, tables)
    return edit.build()


def _fold(edit: Builder, at: int, module: Module, tables: Tables) -> None:
    """Puts constants in the place of what one call gives."""
    op, used = edit.program.ops[at], set(edit.program.uses())
    program = module.programs[op.attrs["program"]]
    results = {name: ref for name, ref in zip(op.outputs, program.outputs, strict=True) if name in used}
    outputs = tuple(dict.fromkeys(results.values()))
    part = prune(replace(program, outputs=outputs, signature={}))
    if not all(ref.name in part.makers() for ref in outputs):
        return
    edit.replace(at)
    values = dict(zip(outputs, tables.values(edit, part, fingerprint(part), tuple(op.uses)), strict=True))
    for name, ref in results.items():
        edit.replace_uses(name, values[ref])


def _takes_constants(op: Op) -> bool:
    return all(ref.is_constant for ref in op.uses)
