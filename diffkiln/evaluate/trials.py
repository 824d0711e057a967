"""One trial of `tune`: a plain spec is checked, built and measured, or refused before anything is built."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from diffkiln.bundle import open_bundle
from diffkiln.compiler.check import check_with
from diffkiln.compiler.compile import compile as build
from diffkiln.compiler.gates import ReadyGate
from diffkiln.compiler.plan import Plan
from diffkiln.errors import DiffkilnError, SystemRefused
from diffkiln.evaluate.album import Album
from diffkiln.evaluate.bench import Measured, Rounds, bench
from diffkiln.evaluate.comparing import short
from diffkiln.evaluate.drawing import draw
from diffkiln.evaluate.prompts import Request
from diffkiln.evaluate.quality import check_drawable
from diffkiln.evaluate.ways import EAGER, Asked, Way, ways_of
from diffkiln.exporters.cache import EngineCache
from diffkiln.plugins import load
from diffkiln.runtime.accelerator import available
from diffkiln.spec.tuning import BYTES, COSTS, LATENCY, MEMORY, Limits

#: Calls of each trial, of which the shortest counts: what else the machine does can only add to a call.
ROUNDS = Rounds(starts=0, warmup=1, runs=10)
_BUNDLE, _PICTURES, _REFERENCES = "bundle", "pictures", "references"

#: The end of a trial: measured and within the limits, measured and not, refused before it was built, or failed.
End = Literal["kept", "missed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        end: how it ended.
        measures: by name; seconds, bytes, and the metrics' own units. Empty where nothing was built.
        reason: why it did not keep the limits, or was not measured.
    """

    end: End
    measures: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the fields; `Outcome(**fields)` is an equal outcome."""
        return {"end": self.end, "measures": dict(self.measures), "reason": self.reason}


@dataclass(frozen=True)
class Goal:
    """The measures of a tuning, and the limits that hold.

    Attributes:
        limits: of time and bytes.
        gates: of quality, by the names of their measures.
        objective: the name of the measure that is to be best.
    """

    limits: Limits
    gates: Mapping[str, ReadyGate]
    objective: str

    @property
    def measures(self) -> tuple[str, ...]:
        return (*COSTS, *self.gates)

    def rises(self, name: str) -> bool:
        """Returns True if higher numbers of a measure are better."""
        return name in self.gates and load("metrics", self.gates[name].gate.metric).better == "higher"

    def missed(self, measures: Mapping[str, float]) -> str:
        """Returns which limits some measures do not keep, and how; empty if they keep all."""
        return "; ".join(self._missed(measures))

    def _missed(self, measures: Mapping[str, float]) -> Iterator[str]:
        for name in COSTS:
            limit = getattr(self.limits, name)
            if limit is not None and name not in measures:
                yield f"{name} cannot be measured here"
            elif limit is not None and measures[name] > limit:
                yield f"{name} is {measures[name]:.4g}, and {limit:.4g} at most is asked for"
        for name, ready in self.gates.items():
            if name not in measures:
                yield f"{name} gave no number"
            elif not ready.keeps(measures[name]):
                yield f"{name} is {measures[name]:.4g}, and {ready.words} is asked for"


@dataclass(frozen=True)
class Workshop:
    """The place where trials are made.

    Attributes:
        folder: for the bundle, of which each trial makes a new one, and for pictures.
        base: the folder that the spec's paths start from.
        reference: a bundle to compare with; None for the pipeline without passes.
        cache: of engines.
        say: told of what is being done.
    """

    folder: Path
    base: Path
    reference: Path | None
    cache: EngineCache
    say: Callable[[str], None]

    def outcome(self, spec: Mapping[str, Any], goal: Goal) -> Outcome:
        """Returns what a plain spec comes to.

        Args:
            spec: as JSON; its gates are measured on the bundle, and not pass by pass.
            goal: what is wanted.

        Raises:
            SystemRefused: the disk is full, or something else that would end every trial.
        """
        plain = {key: value for key, value in spec.items() if key != "quality"}
        try:
            if reason := _predicted(check_with(plain, self.base), goal.limits):
                return Outcome("refused", reason=reason)
        except DiffkilnError as error:
            return Outcome("refused", reason=_line(error))
        try:
            measures = self._measured(plain, goal)
        except SystemRefused:
            raise
        except DiffkilnError as error:
            return Outcome("failed", reason=_line(error))
        missed = goal.missed(measures)
        return Outcome("missed" if missed else "kept", measures, missed)

    def _measured(self, plain: dict[str, Any], goal: Goal) -> dict[str, float]:
        self.say("build")
        # A bundle that replaces another one shares the weights that are the same.
        bundle = build(plain, self.folder / _BUNDLE, base=self.base, force=True, cache=self.cache).path
        prompts = [ready.prompts[0] for ready in goal.gates.values()]
        found = bench(bundle, rounds=ROUNDS, prompt=prompts[0] if prompts else None, progress=self.say)
        measures = {**_costs(found.ways[0]), BYTES: _size(bundle)}
        if goal.gates:
            measures |= self._quality(bundle, goal.gates)
        return {
            name: value for name, found in measures.items() if (value := short(found)) is not None and isfinite(value)
        }

    def _quality(self, bundle: Path, gates: Mapping[str, ReadyGate]) -> dict[str, float | None]:
        """Returns each gate's metric, of pictures that the bundle and the reference draw from the same noise."""
        against = EAGER if self.reference is None else str(self.reference)
        ours, theirs = ways_of(bundle, (against,), Asked())
        for way in (ours, theirs):
            check_drawable(way)
        requests = _requests(gates.values())
        own = Album(self.folder / _PICTURES / str(ours.job["identity"]))
        reference = Album(self.folder / _REFERENCES / _digest(theirs, requests))
        draw(ours, requests, own, self.say)
        draw(theirs, requests, reference, self.say)
        found: dict[str, float | None] = {}
        for name, ready in gates.items():
            numbers = [requests.index(item) for item in _requests([ready])]
            pictures, references = ([side.get(number).picture for number in numbers] for side in (own, reference))
            found[name] = ready.measured(pictures, references, {})
        shutil.rmtree(own.folder)
        return found


def _requests(gates: Any) -> list[Request]:
    """Returns what the gates have drawn, each once."""
    pairs = (pair for ready in gates for pair in zip(ready.prompts, ready.seeds, strict=True))
    return [Request(*pair) for pair in dict.fromkeys(pairs)]


def _digest(way: Way, requests: Sequence[Request]) -> str:
    """Returns what a reference's pictures are of, so that trials with the same inputs share them."""
    if way.is_bundle:
        source = [way.job["identity"]]
    else:
        source = [way.job[name] for name in ("path", "class_name", "dtypes", "variant")] + [way.job["spec"]["source"]]
    identity = json.dumps([source, way.call.as_json(), [vars(request) for request in requests]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _costs(way: Measured) -> dict[str, float | None]:
    call = way.seconds["call"]
    memory = way.device if way.device is not None else way.host
    return {LATENCY: call.lowest if call else None, MEMORY: memory}


def _size(bundle: Path) -> int:
    with open_bundle(bundle) as opened:
        return sum(row.size for row in opened.manifest.files)


def _predicted(plan: Plan, limits: Limits) -> str:
    """Returns why a plan cannot keep the limits or run here, from configuration alone; empty if it may."""
    if all(target.device == "cuda" for target in plan.targets) and not available():
        return f"is measured on this machine, and it has no GPU for {plan.targets[0].name}"
    least = _least_bytes(plan)
    if limits.bytes is not None and least > limits.bytes:
        return f"its weights are {least:.4g} bytes, and {limits.bytes:.4g} at most are asked for"
    if plan.spec.runtime.offload is not None:
        return ""
    for name, room in _rooms(plan, limits):
        if least > room:
            return f"its weights are {least:.4g} bytes and all stay in memory, and {name} is {room:.4g}"
    return ""


def _rooms(plan: Plan, limits: Limits) -> Iterator[tuple[str, float]]:
    if limits.memory is not None:
        yield "the limit", limits.memory
    for target in plan.targets:
        if target.memory_bytes is not None:
            yield f"the memory of {target.name}", target.memory_bytes


def _least_bytes(plan: Plan) -> int:
    """Returns a number of bytes that a bundle surely has more than: those of the components whose weights all stay, as
    they are. A call may read half of an autoencoder, and engines with weights in them may hold them in another type.
    """
    unsure = {item.step.component for item in plan.listed if item.step.leaves_weights_out}
    unsure |= {request.component for request in plan.state.compile if request.holds_weights}
    sure = [name for name, module in plan.state.modules.items() if not hasattr(module, "decode")]
    return sum(plan.bytes_after[name] for name in sure if name not in unsure)


def _line(error: DiffkilnError) -> str:
    return " ".join(str(error).split())
