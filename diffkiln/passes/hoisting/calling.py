"""The calls of a component in phases: tables in the place of what is fixed, preambles before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.hoisting.choosing import Rules
from diffkiln.passes.hoisting.components import Divided, Given, divide
from diffkiln.passes.hoisting.dependence import NOTHING, Depends, of_call
from diffkiln.passes.hoisting.tables import Tables
from diffkiln.program import CALL, Builder, Module, Op, Program, Ref, fingerprint
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Fold

_TABLES = (NOTHING, Depends.SCHEDULE)


@dataclass(frozen=True)
class Hoisted:
    """A component and its calls after hoisting.

    Attributes:
        calls: the programs of each variant.
        module: the component: what is left in the loop, and preambles.
        folds: what is evaluated when the bundle is made.
        dear: how many operations stay in the loop, since what they give is larger than their weights.
    """

    calls: list[dict[str, Program]]
    module: Module
    folds: tuple[Fold, ...]
    dear: int

    @property
    def preambles(self) -> list[Program]:
        """Returns the programs that run before the first step."""
        return [program for program in self.module.programs.values() if program.ahead]

    @property
    def is_empty(self) -> bool:
        """Returns True if nothing is evaluated ahead."""
        return not self.folds and not self.preambles


def hoisted(
    calls: Sequence[Mapping[str, Program]],
    module: Module,
    constants: Constants,
    keep: tuple[str, ...] = (),
    keep_originals: bool = False,
) -> Hoisted:
    """Returns a component and its calls with what does not follow the latents evaluated ahead.

    Args:
        calls: the programs of each variant.
        module: the component.
        constants: get a place for each value that is evaluated when the bundle is made.
        keep: patterns of layers whose operations stay in the loop.
        keep_originals: have weights stay in the bundle that nothing reads any more.
    """
    every = [call for programs in calls for call in programs.values()]
    given = _given(every, module)
    divided = divide(module, given, replace(_rules(every, module, given), keep=keep))
    caller = _Caller(module, divided, constants)
    rewritten = [{name: caller.rewritten(call) for name, call in programs.items()} for programs in calls]
    programs = {name: phased.rest for name, phased in divided.programs.items()} | caller.preambles
    module = replace(module, programs=programs, regions=divided.regions)
    return Hoisted(rewritten, module, caller.folds(keep_originals), divided.dear)


def _sites(call: Program, component: str) -> list[tuple[int, Op]]:
    return [(at, op) for at, op in enumerate(call.ops) if op.name == CALL and op.attrs["component"] == component]


def _given(calls: Sequence[Program], module: Module) -> Given:
    """Returns what the inputs of the component's programs depend on, in all their calls together."""
    given = {name: [NOTHING] * len(program.inputs) for name, program in module.programs.items()}
    for call in calls:
        found = of_call(call, module.component)
        for _, op in _sites(call, module.component):
            name = op.attrs["program"]
            args = [found.get(ref.name, Depends.REQUEST) for ref in op.uses]
            given[name] = [old | new for old, new in zip(given[name], args, strict=True)]
    return given


def _rules(calls: Sequence[Program], module: Module, given: Given) -> Rules:
    """Returns how often what is evaluated ahead is evaluated."""
    rows: set[tuple[Ref, ...]] = set()
    timesteps = 0
    for call in calls:
        own: set[tuple[Ref, ...]] = set()
        for _, op in _sites(call, module.component):
            pairs = list(zip(op.uses, given[op.attrs["program"]], strict=True))
            rows.add(tuple(ref for ref, on in pairs if on == Depends.SCHEDULE))
            own.add(tuple(ref for ref, on in pairs if Depends.LATENTS not in on))
        timesteps = max(timesteps, len(own))
    return Rules(len(rows), timesteps)


class _Caller:
    """The rewriting of calls, which collects the tables and preambles that they need.

    Args:
        module: the component as it was.
        divided: the same in phases.
        constants: get a place for each value of a table.

    Attributes:
        preambles: programs that are called before the first step, by name.
    """

    def __init__(self, module: Module, divided: Divided, constants: Constants) -> None:
        self._module, self._divided = module, divided
        self._tables = Tables(module.component, constants)
        self._by_print: dict[str, Program] = {}
        parts = [part for phased in divided.programs.values() for part in phased.phases.values()]
        self._prints = {id(part): fingerprint(part) for part in parts}

    @property
    def preambles(self) -> dict[str, Program]:
        return {program.name: program for program in self._by_print.values()}

    def folds(self, keeps: bool) -> tuple[Fold, ...]:
        """Returns what is evaluated when the bundle is made."""
        return self._tables.folds(self._divided.regions, keeps)

    def rewritten(self, call: Program) -> Program:
        """Returns the call with the component's calls in phases."""
        edit = Builder(call)
        position = {name: at for at, op in enumerate(call.ops) for name in op.outputs}
        made: dict[tuple[str, tuple[Ref, ...]], tuple[Ref, ...]] = {}
        sites = _sites(call, self._module.component)
        for at, op in sites:
            phased = self._divided.programs[op.attrs["program"]]
            whole = self._module.programs[op.attrs["program"]]
            values = {item.name: ref for item, ref in zip(whole.inputs, op.uses, strict=True)}
            for on, part in phased.phases.items():
                args = tuple(values[item.name] for item in part.inputs)
                key = self._prints[id(part)], args
                if key not in made and on in _TABLES:
                    made[key] = self._tables.values(edit, part, key[0], args)
                elif key not in made:
                    # Before the first step, if its arguments are there by then.
                    before = max([sites[0][0], *(position[ref.name] + 1 for ref in args if ref.name in position)])
                    made[key] = self._preamble(edit, before, part, args)
                    position |= {ref.name: before - 1 for ref in made[key]}
                values |= {ref.name: result for ref, result in zip(part.outputs, made[key], strict=True)}
            edit.replace(at, replace(op, args=tuple(values[item.name] for item in phased.rest.inputs)))
        return edit.build()

    def _preamble(self, edit: Builder, before: int, part: Program, args: tuple[Ref, ...]) -> tuple[Ref, ...]:
        """Puts a call of a preamble at a place; returns its results."""
        program = self._by_print.setdefault(self._prints[id(part)], part)
        attrs = {"component": self._module.component, "program": program.name}
        call = edit.op(CALL, args, program.result_types(f"%{program.name}"), attrs=attrs)
        edit.insert(before, call)
        return call.results
