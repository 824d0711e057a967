"""Measures what each pass costs: pictures after every pass, beside those of the pipeline without any.

The passes are applied one more each time (and, if asked, each alone), to the pipeline with its weights in memory, and
the recorded program is replayed without engines. The last row is the finished bundle's, engines and all, before it is
published. A gate that a row does not keep stops the build, and names the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffkiln.bundle import open_bundle
from diffkiln.compiler.check import check_with
from diffkiln.compiler.folding import Folding
from diffkiln.compiler.gates import Function, ReadyGate
from diffkiln.compiler.in_memory import InMemory
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.errors import DiffkilnError, IllegalPlan, Incompatible, QualityError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.folder import IF_READ
from diffkiln.models.meta import load_module
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.registry import IMPLIED, ListedPass
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant

#: Whether passes are evaluated one more each time, or each alone as well.
Mode = Literal["cumulative", "each"]
BUNDLE = "bundle"
_CPU = torch.device("cpu")

#: Pictures of each gate, by the gate's place in the spec: float32 [frames, 3, height, width] of each prompt.
Pictures = Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class LedgerEntry:
    """One row: the pass, and the value of each gate's metric after it; None where it was not measured.

    Attributes:
        name: the pass and its component, or "bundle".
        values: by the gate's place in the spec.
        reason: why nothing was measured.
        regains: whether its last pass makes good what earlier ones lost, which then are judged by this row.
    """

    name: str
    values: Mapping[str, float | None]
    reason: str = ""
    regains: bool = False

    def as_json(self, where: str) -> dict[str, Any]:
        """Returns the row of one gate's table."""
        value = self.values.get(where)
        entry = {"pass": self.name, "value": None if value is None else float(f"{value:.6g}")}
        return entry if value is not None else {**entry, "reason": self.reason}


@dataclass(frozen=True)
class Ledger:
    """The rows of a build.

    Attributes:
        gates: what is measured.
        cumulative: after each pass, and of the finished bundle.
        each: with each pass alone.
        references: the pictures of the pipeline without passes, by the places of those that add components: these
            count as the pipeline's own, since others can only be compared with them in their size.
    """

    gates: tuple[ReadyGate, ...]
    cumulative: tuple[LedgerEntry, ...] = ()
    each: tuple[LedgerEntry, ...] = ()
    references: dict[tuple[int, ...], Pictures] = field(default_factory=dict, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Returns a table for each gate, as `build.json` has them; empty without gates."""
        return {"tables": [self._table(gate) for gate in self.gates]} if self.gates else {}

    def _table(self, ready: ReadyGate) -> dict[str, Any]:
        given = ready.pinned() | {"pictures": len(ready.prompts)}
        given["cumulative"] = [row.as_json(ready.where) for row in self.cumulative]
        return given | ({"each": [row.as_json(ready.where) for row in self.each]} if self.each else {})

    def judged(self) -> Ledger:
        """Returns the ledger.

        Raises:
            QualityError: a row does not keep a gate; names the first pass after which it is so.
        """
        for ready in self.gates:
            rows = [(row, value) for row in self.cumulative if (value := row.values.get(ready.where)) is not None]
            judged = max((at for at, (row, _) in enumerate(rows) if row.regains), default=0)
            bad = next(((row, value) for row, value in rows[judged:] if not ready.keeps(value)), None)
            if bad is not None:
                row, value = bad
                first = next(at for at, (_, found) in enumerate(rows) if not ready.keeps(found))
                culprit = rows[first][0].name
                before = "without passes it was not measured"
                if first:
                    before = f"after {rows[first - 1][0].name} it was {rows[first - 1][1]:.4g}"
                cost = "the engines cost it" if culprit == BUNDLE else f"{culprit} cost it"
                raise QualityError(
                    f"{ready.where}: {ready.words} is asked for, and {ready.gate.metric} is {value:.4g} after "
                    f"{row.name}; {before}. So {cost}. Choose a milder pass, or another limit"
                )
        return self


@dataclass(frozen=True)
class _Draws:
    """The prompts and seeds that the pictures of every row are drawn for."""

    plan: Plan
    base: Path
    own: Mapping[str, Function]
    references: dict[tuple[int, ...], Pictures] = field(default_factory=dict)

    def row(self, name: str, pictures: Pictures, items: Sequence[ListedPass]) -> LedgerEntry:
        reference = self.reference(items)
        values = {
            ready.where: ready.measured(pictures[ready.where], reference[ready.where], self.own)
            for ready in self.plan.gates
        }
        return LedgerEntry(name, values)

    def reference(self, items: Sequence[ListedPass]) -> Pictures:
        """Returns the pictures of the pipeline without passes, but for those of these that add components to it."""
        adding = [item for item in items if item.step.adds]
        key = tuple(item.index for item in adding)
        if key not in self.references:
            self.references[key] = _pictures(self, adding)
        return self.references[key]


def ledger_of(plan: Plan, base: Path, own: Mapping[str, Function], mode: Mode, stages: Stages) -> Ledger:
    """Returns the rows of a plan's passes, judged.

    Args:
        plan: with the steps of its schedules chosen.
        base: the folder that the spec's paths start from.
        own: metrics of the caller, by name.
        mode: also each pass alone, if "each".
        stages: told of what is drawn.

    Raises:
        QualityError: a gate is not kept; names the pass.
    """
    if not plan.gates:
        return Ledger(())
    with stages("draw without passes"), quiet_libraries():
        draws = _Draws(plan, base, own)
        draws.reference(())
    ledger = Ledger(plan.gates, references=draws.references)
    kept: list[ListedPass] = []
    waiting: list[str] = []
    entries = _entries(plan)
    last = max((at for at, (_, items) in enumerate(entries) if _regains(items)), default=0)
    for at, (name, items) in enumerate(entries):
        kept += items
        waiting.append(name)
        with stages(f"draw with {name}"), quiet_libraries():
            row = _row(draws, " and ".join(waiting), kept)
        # As a calibration without its schedule, or engines, which the bundle has: they count with the next row.
        if row is not None and not row.reason:
            waiting.clear()
            ledger = replace(ledger, cumulative=(*ledger.cumulative, replace(row, regains=_regains(items))))
            ledger = ledger.judged() if at >= last else ledger
    for name, items in _entries(plan) if mode == "each" else ():
        with stages(f"draw with {name} alone"), quiet_libraries():
            alone = _row(draws, name, items)
        ledger = replace(ledger, each=(*ledger.each, alone)) if alone is not None else ledger
    return ledger


def _entries(plan: Plan) -> list[tuple[str, list[ListedPass]]]:
    """Returns the passes of each entry of the spec, with the entry's name."""
    found: dict[int, list[ListedPass]] = {}
    for item in (item for item in plan.listed if item.index != IMPLIED):
        found.setdefault(item.index, []).append(item)
    return [(_name(items), items) for items in found.values()]


def _regains(items: Sequence[ListedPass]) -> bool:
    """Returns True if the passes make good what earlier ones lost."""
    return any(fact.name == "recovered" for item in items for fact in item.step.provides())


def with_bundle(ledger: Ledger, root: Path, plan: Plan, base: Path, own: Mapping[str, Function]) -> Ledger:
    """Returns the ledger with the row of the finished bundle in a directory, judged.

    Raises:
        QualityError: a gate is not kept.
    """
    if not plan.gates:
        return ledger
    with quiet_libraries():
        try:
            with open_bundle(root) as bundle:
                verified = bundle.verify()
            with (
                verified,
                load_verified(verified, None, _CPU, LoadOptions(allow_native=True, check_engines=False)) as pipe,
            ):
                pictures = {ready.where: _called(pipe, ready) for ready in plan.gates}
        except Incompatible as error:
            row = LedgerEntry(BUNDLE, {}, f"this machine cannot run it: {error}")
        else:
            row = _Draws(plan, base, own, ledger.references).row(BUNDLE, pictures, plan.listed)
    return replace(ledger, cumulative=(*ledger.cumulative, row)).judged()


def _name(items: Sequence[ListedPass]) -> str:
    components = ", ".join(item.step.component for item in items if item.step.component)
    return f"{items[0].step.name} {components}".strip()


def _row(draws: _Draws, name: str, items: Sequence[ListedPass]) -> LedgerEntry | None:
    """Returns the row of these passes; None if the last of them adds engines, which a replay does not have."""
    try:
        plan, chosen = _planned(draws, items)
    except IllegalPlan as error:
        return LedgerEntry(name, {}, f"it cannot stand alone: {error}")
    if plan.state.compile and _adds_engines(draws, plan, items):
        return None
    return draws.row(name, _drawn(draws, plan, chosen), items)


def _adds_engines(draws: _Draws, plan: Plan, items: Sequence[ListedPass]) -> bool:
    """Returns True if the last entry of these passes adds engines."""
    fewer, _ = _planned(draws, [item for item in items if item.index != items[-1].index])
    return len(plan.state.compile) > len(fewer.state.compile)


def _pictures(draws: _Draws, items: Sequence[ListedPass]) -> Pictures:
    """Returns the pictures with these passes, for every gate."""
    return _drawn(draws, *_planned(draws, items))


def _drawn(draws: _Draws, plan: Plan, chosen: Sequence[ListedPass]) -> Pictures:
    pipe = _replayed(plan, chosen)
    return {ready.where: _called(pipe, ready) for ready in draws.plan.gates}


def _planned(draws: _Draws, items: Sequence[ListedPass]) -> tuple[Plan, Sequence[ListedPass]]:
    """Returns a plan with these passes alone, and the passes with the steps that a calibration has chosen.

    Raises:
        IllegalPlan: the passes are illegal without the others.
    """
    spec, wanted = draws.plan.spec, {item.index for item in items}
    entries = tuple(entry for index, entry in enumerate(spec.passes) if index in wanted)
    runtime = spec.runtime.model_copy(update={"adapters": None})  # which are zeros until one is put in
    fewer = spec.model_copy(update={"passes": entries, "quality": None, "runtime": runtime})
    return check_with(fewer, draws.base), items


def _replayed(plan: Plan, chosen: Sequence[ListedPass]) -> CompiledPipeline:
    """Returns the pipeline of a plan, replayed without engines, with its weights in memory.

    Raises:
        QualityError: the call cannot be recorded.
    """
    try:
        recording: Recording = record(plan.pipe, plan.requests, Constants(), IF_READ)
    except DiffkilnError as error:
        raise QualityError(f"gates of quality need a call that can be recorded: {error}") from error
    recording, _ = manager.rewrite(recording, chosen)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name in dict.fromkeys([*recording.modules, *(fold.component for fold in recording.folds)]):
        module = load_module(plan.source, name, plan.dtype)
        manager.apply(module, name, chosen)
        weights[name] = dict(weights_of(module))
        folding = Folding(recording, name)
        folding.add(weights[name])
        folding.finish()
    store: Any = InMemory(weights)
    executor = Executor(recording.modules, store, recording.constants.tensors, {}, _CPU)
    variant = CompiledVariant("ledger", dict(plan.requests[0].fixed), recording.calls[0])
    text = TextEnd(tokenizers_of(recording, plan.pipe))
    return CompiledPipeline(type(plan.pipe).__name__, [variant], executor, text, None)


def _called(pipe: CompiledPipeline, ready: ReadyGate) -> list[torch.Tensor]:
    """Returns the picture of each prompt."""
    batch = pipe.variants[0].batch_size
    made: list[torch.Tensor] = []
    for prompt, seed in zip(ready.prompts, ready.seeds, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        given = prompt if batch == 1 else [prompt] * batch
        result = next(iter(pipe(given, generator=generator, output_type="pt", allow_nan=True).values()))
        picture = result[0].float()
        made.append(picture if picture.ndim == 4 else picture[None])
    return made
