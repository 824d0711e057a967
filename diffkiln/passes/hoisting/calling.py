"""The calls of a component in phases: tables in the place of what is fixed, preambles before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.guards.printable import get_logger
from diffkiln.passes.hoisting.batching import Batch, RowsMeet
from diffkiln.passes.hoisting.choosing import Rules
from diffkiln.passes.hoisting.components import Divided, Given, divide
from diffkiln.passes.hoisting.dependence import NOTHING, Depends, of_call
from diffkiln.passes.hoisting.phases import SUFFIXES, Phased
from diffkiln.passes.hoisting.tables import Tables
from diffkiln.program import CALL, Builder, Module, Op, Program, Ref, TensorType, fingerprint
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Fold

_TABLES = (NOTHING, Depends.SCHEDULE)
_TIMED = Depends.SCHEDULE | Depends.REQUEST

log = get_logger(__name__)


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
    batch: bool = True,
) -> Hoisted:
    """Returns a component and its calls with what does not follow the latents evaluated ahead.

    Args:
        calls: the programs of each variant.
        module: the component.
        constants: get a place for each value that is evaluated when the bundle is made.
        keep: patterns of layers whose operations stay in the loop.
        keep_originals: have weights stay in the bundle that nothing reads any more.
        batch: evaluate what follows timestep and request for all steps at once, where rows do not meet.
    """
    every = [call for programs in calls for call in programs.values()]
    given = _given(every, module)
    divided = divide(module, given, replace(_rules(every, module, given), keep=keep))
    caller = _Caller(module, divided, constants, batch)
    rewritten = [{name: caller.rewritten(call) for name, call in programs.items()} for programs in calls]
    programs = {name: phased.rest for name, phased in divided.programs.items()} | caller.preambles
    module = replace(module, programs=programs, regions=caller.regions)
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
        batch: evaluate what follows timestep and request for all steps at once, where rows do not meet.

    Attributes:
        preambles: programs that are called before the first step, by name.
        regions: those that the programs call, by name.
    """

    def __init__(self, module: Module, divided: Divided, constants: Constants, batch: bool) -> None:
        self.module, self.divided, self.batch = module, divided, batch
        self.tables = Tables(module.component, constants)
        self.regions = dict(divided.regions)
        self._by_print: dict[str, Program] = {}
        self._batched: dict[tuple[str, int], Program | None] = {}
        parts = [part for phased in divided.programs.values() for part in phased.phases.values()]
        self._prints = {id(part): fingerprint(part) for part in parts}

    @property
    def preambles(self) -> dict[str, Program]:
        return {program.name: program for program in self._by_print.values()}

    def folds(self, keeps: bool) -> tuple[Fold, ...]:
        """Returns what is evaluated when the bundle is made."""
        return self.tables.folds(self.divided.regions, keeps)

    def rewritten(self, call: Program) -> Program:
        """Returns the call with the component's calls in phases."""
        return _Call(self, call).rewritten()

    def mark(self, part: Program) -> str:
        """Returns the fingerprint of a part in phases."""
        return self._prints[id(part)]

    def preamble(self, part: Program, mark: str) -> Program:
        """Returns the program that a preamble calls: one for all parts of a fingerprint."""
        return self._by_print.setdefault(mark, part)

    def batched(self, part: Program, count: int) -> Program | None:
        """Returns a part for the rows of several calls; None where rows meet."""
        key = self.mark(part), count
        if key not in self._batched:
            batch = Batch(self.divided.regions, count)
            try:
                self._batched[key] = batch.program(part)
                self.regions |= batch.regions
            except RowsMeet as reason:
                log.debug("%s is evaluated once a step: %s", part.name, reason)
                self._batched[key] = None
        return self._batched[key]


@dataclass
class _Site:
    """A call of the component: its place, its phases, and the values that they have in the pipeline's call."""

    at: int
    op: Op
    phased: Phased
    values: dict[str, Ref]

    def args(self, part: Program) -> tuple[Ref, ...]:
        return tuple(self.values[item.name] for item in part.inputs)

    def learn(self, part: Program, results: Sequence[Ref]) -> None:
        self.values |= {ref.name: result for ref, result in zip(part.outputs, results, strict=True)}


class _Call:
    """The rewriting of one call: phase by phase, for all its sites, and in the end what is left in the loop."""

    def __init__(self, caller: _Caller, call: Program) -> None:
        self._caller, self._edit = caller, Builder(call)
        self._position = {name: at for at, op in enumerate(call.ops) for name in op.outputs}
        self._made: dict[tuple[str, tuple[Ref, ...]], tuple[Ref, ...]] = {}
        self._rows: dict[tuple[Ref, ...], Ref] = {}
        self._sites = [self._site(at, op) for at, op in _sites(call, caller.module.component)]

    def _site(self, at: int, op: Op) -> _Site:
        name = op.attrs["program"]
        whole = self._caller.module.programs[name]
        values = {item.name: ref for item, ref in zip(whole.inputs, op.uses, strict=True)}
        return _Site(at, op, self._caller.divided.programs[name], values)

    def rewritten(self) -> Program:
        for on in SUFFIXES:
            here = [(site, site.phased.phases[on]) for site in self._sites if on in site.phased.phases]
            if on == _TIMED and self._caller.batch:
                self._evaluate_together(here)
            for site, part in here:
                site.learn(part, self._evaluated(on, part, site.args(part)))
        for site in self._sites:
            self._edit.replace(site.at, replace(site.op, args=site.args(site.phased.rest)))
        return self._edit.build()

    def _evaluated(self, on: Depends, part: Program, args: tuple[Ref, ...]) -> tuple[Ref, ...]:
        """Returns what a part gives, from a table or a preamble."""
        mark = self._caller.mark(part)
        if (mark, args) not in self._made:
            if on in _TABLES:
                results = self._caller.tables.values(self._edit, part, mark, args)
            else:
                results = self._called(self._caller.preamble(part, mark), args).results
            self._made[mark, args] = results
        return self._made[mark, args]

    def _evaluate_together(self, here: Sequence[tuple[_Site, Program]]) -> None:
        """Evaluates each part once for all steps, where its rows allow that and all arguments are there in time."""
        mark_of = self._caller.mark
        for mark, part in {mark_of(part): part for _, part in here}.items():
            wanted = list(dict.fromkeys(site.args(own) for site, own in here if mark_of(own) == mark))
            in_time = all(self._before(args) == self._sites[0].at for args in wanted)
            if len(wanted) > 1 and in_time and (program := self._caller.batched(part, len(wanted))):
                self._evaluate_rows(mark, part, program, wanted)

    def _evaluate_rows(self, mark: str, part: Program, program: Program, wanted: Sequence[tuple[Ref, ...]]) -> None:
        """Evaluates a part by a program for the rows of all its calls."""
        by_input = zip(zip(*wanted, strict=True), program.inputs, strict=True)
        joined = tuple(self._joined(values, item.type) for values, item in by_input)
        call = self._called(self._caller.preamble(program, f"{mark} {len(wanted)}"), joined)
        parted = [
            self._parted(rows, part.types[ref.name], len(wanted))
            for rows, ref in zip(call.results, part.outputs, strict=True)
        ]
        self._made |= {(mark, args): own for args, own in zip(wanted, zip(*parted, strict=True), strict=True)}

    def _joined(self, values: tuple[Ref, ...], type_: TensorType) -> Ref:
        """Returns the rows of several values as one."""
        if values not in self._rows:
            cat = self._edit.op("aten.cat.default", (values,), {"%rows": type_})
            self._insert(cat)
            (self._rows[values],) = cat.results
        return self._rows[values]

    def _parted(self, rows: Ref, type_: TensorType, count: int) -> tuple[Ref, ...]:
        """Returns the rows of each call."""
        types = {f"{rows.name}.{index}": type_ for index in range(count)}
        chunk = self._edit.op("aten.chunk.default", (rows, count), types)
        self._insert(chunk)
        return chunk.results

    def _called(self, program: Program, args: tuple[Ref, ...]) -> Op:
        """Puts a call of a preamble before the first step, or as soon as its arguments are there; returns it."""
        attrs = {"component": self._caller.module.component, "program": program.name}
        call = self._edit.op(CALL, args, program.result_types(f"%{program.name}"), attrs=attrs)
        self._insert(call)
        return call

    def _insert(self, op: Op) -> None:
        before = self._before(op.uses)
        self._edit.insert(before, op)
        self._position |= dict.fromkeys(op.outputs, before - 1)

    def _before(self, args: Iterable[Ref]) -> int:
        """Returns the place before which arguments are there, and which no step comes before."""
        return max([self._sites[0].at, *(self._position[ref.name] + 1 for ref in args if ref.name in self._position)])
