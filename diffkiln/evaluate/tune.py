"""Finds the spec that is best within limits: each trial builds and measures one of those that choices stand for.

Trials are kept in a folder as they end, so a tuning that was killed goes on where it was. Engines come from the cache
where an earlier trial built them, and a bundle shares the weights that it has in common with the trial's before.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from diffkiln.compiler.check import base_of
from diffkiln.compiler.gates import ReadyGate, ready_gates
from diffkiln.errors import IllegalPlan, OutputBusy, QualityError, SpecError
from diffkiln.evaluate.album import claim
from diffkiln.evaluate.crew import Alone, Crew, cluster
from diffkiln.evaluate.study import Asked, Trial, Trials, need_optuna, opened
from diffkiln.evaluate.trials import Goal, Workshop
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.passes.registry import read_passes
from diffkiln.spec import parse_spec, resolve_targets
from diffkiln.spec.choices import Choice, count, in_words
from diffkiln.spec.tuning import BYTES, LATENCY, MEMORY, Tuning, read_tuning

Progress = Callable[[str], None]
#: Shares by which two measurements of the same bundle differ; smaller differences beat nothing.
_NOISE = {LATENCY: 0.02, MEMORY: 0.02}


@dataclass(frozen=True)
class Tuned:
    """The trials of a spec with choices.

    Attributes:
        path: the file with the plain spec that is best.
        best: its trial.
        trials: all that ended, in order.
        unbeaten: numbers of the trials within the limits that no other one beats: as good in all, and better in one.
        goal: what was wanted.
        choices: of the spec.
        combinations: how many specs the choices stand for.
        machine: where it was measured, as words.
    """

    path: Path
    best: Trial
    trials: tuple[Trial, ...]
    unbeaten: tuple[int, ...]
    goal: Goal
    choices: tuple[Choice, ...]
    combinations: int
    machine: Mapping[str, str]

    def in_words(self, trial: Trial) -> str:
        """Returns what a trial chose, in words."""
        return in_words(self.choices, trial.picks)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as a JSON value."""
        return {
            "spec": str(self.path),
            "best": self.best.number,
            "objective": self.goal.objective,
            "combinations": self.combinations,
            "machine": dict(self.machine),
            "trials": [self._as_json(trial) for trial in self.trials],
        }

    def _as_json(self, trial: Trial) -> dict[str, Any]:
        picked = [item for item in self.choices if item.where in trial.picks]
        chosen = {item.where: item.values[trial.picks[item.where]] for item in picked}
        own = {"number": trial.number, "chosen": chosen, "unbeaten": trial.number in self.unbeaten}
        return own | trial.outcome.as_json()


@gated("progress")
def tune(
    spec: str | PathLike[str],
    output: str | PathLike[str],
    *,
    trials: int = 20,
    timeout: float | None = None,
    cache: EngineCache | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Tries what a spec leaves to be chosen, and writes the best plain spec beside it.

    Args:
        spec: the file of a spec with choices.
        output: the folder that keeps the trials; a later call with the same spec goes on from them.
        trials: how many combinations to try at most, those of earlier calls included; all, if there are not more.
        timeout: seconds after which no other trial begins.
        cache: of engines; by default the user's. Nodes of a cluster have their own.
        ray: the address of a Ray cluster whose nodes make the trials side by side; None makes them here, one by one.
        progress: called with what is being done.

    Raises:
        SpecError: the spec holds no choices, or something in it is wrong.
        IllegalPlan: every trial was refused before it was built.
        QualityError: no trial keeps the limits.
        OutputBusy: another process is tuning in this folder.
        MissingDependency: optuna or Ray is not installed.
        SystemRefused: the cluster cannot be reached, or its nodes differ.
    """
    need_optuna()
    began, path, folder, say = time.monotonic(), Path(spec), Path(output), progress or (lambda _: None)
    if trials < 1:
        raise SpecError(f"{trials} trials try nothing. Give 1 or more")
    tuning = read_tuning(path, _parse)
    base = base_of(path, None)
    goal, reference = _goal(tuning, base), _reference(tuning, base)
    workshop = Workshop(folder, base, reference, cache or EngineCache(), say)
    until = float("inf") if timeout is None else began + timeout
    with ExitStack() as stack:
        crew = stack.enter_context(_crew(ray, workshop, tuning))
        here = crew.machine
        stack.enter_context(_claimed(folder, path, tuning, goal, here))
        study = stack.enter_context(opened(folder, tuning, goal, trials))
        _try(study, tuning, goal, crew, until, say)
        ended = tuple(study)
    best = _best(ended, goal)
    _write(winner_of(path), tuning.plain(best.picks))
    return Tuned(
        winner_of(path), best, ended, unbeaten(ended, goal), goal, tuple(tuning.choices), count(tuning.data), here
    )


def _crew(ray: str | None, workshop: Workshop, tuning: Tuning) -> AbstractContextManager[Crew]:
    if ray is None:
        return nullcontext(Alone(workshop))
    gpu = any(target.device == "cuda" for target in resolve_targets(tuning.first))
    return cluster(ray, workshop.base.absolute(), workshop.reference and workshop.reference.absolute(), gpu)


def _try(study: Trials, tuning: Tuning, goal: Goal, crew: Crew, until: float, say: Progress) -> None:
    """Makes the trials that are left, as many at once as there are places, until the time is over."""
    running: dict[Any, Asked] = {}
    try:
        while True:
            while study.left and len(running) < crew.capacity and time.monotonic() < until:
                asked = study.begin()
                say(f"trial {study.begun}: {in_words(tuning.choices, asked.picks)}")
                running[crew.begin(tuning.plain(asked.picks), goal)] = asked
            if not running:
                return
            work, outcome = crew.first(list(running))
            asked = running.pop(work)
            study.drop(asked) if outcome is None else study.end(asked, outcome)
    finally:
        for asked in running.values():
            study.drop(asked)


def winner_of(spec: Path) -> Path:
    """Returns the file of the best spec. It lies beside the spec with choices, where the paths in it start."""
    return spec.with_name(f"{spec.stem}-tuned.json")


def unbeaten(trials: Sequence[Trial], goal: Goal) -> tuple[int, ...]:
    """Returns the numbers of the trials within the limits that no other one beats: none is as good in every measure and
    better in one. Bytes count if they are the objective.
    """
    names = [name for name in goal.measures if name != BYTES or goal.objective == BYTES]
    kept = [trial for trial in trials if trial.outcome.end == "kept"]
    costs = {trial.number: {name: _cost(trial, name, goal) for name in names} for trial in kept}
    return tuple(number for number, own in costs.items() if not any(_beats(other, own) for other in costs.values()))


def _beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Returns True if costs are as low as others in everything, and lower in something."""
    noise = {name: _NOISE.get(name, 0.0) * abs(value) if isfinite(value) else 0.0 for name, value in other.items()}
    lower = any(one[name] < other[name] - noise[name] for name in other)
    return lower and all(one[name] <= other[name] + noise[name] for name in other)


def _parse(data: dict[str, Any]) -> None:
    read_passes(parse_spec(data).passes)


def _goal(tuning: Tuning, base: Path) -> Goal:
    gates: dict[str, ReadyGate] = {}
    for ready in ready_gates(tuning.first, base):
        name = ready.gate.metric
        again = sum(other.gate.metric == name for other in gates.values())
        gates[f"{name} ({again + 1})" if again else name] = ready
    return Goal(tuning.wanted.limits, gates, tuning.wanted.objective)


def _reference(tuning: Tuning, base: Path) -> Path | None:
    from diffkiln.bundle.layout import MANIFEST

    if tuning.wanted.reference is None:
        return None
    path = base / tuning.wanted.reference
    if not (path / MANIFEST).is_file():
        raise SpecError(f"$.tune.reference: there is no bundle at {path}. Name a bundle's directory")
    return path


@contextmanager
def _claimed(folder: Path, spec: Path, tuning: Tuning, goal: Goal, here: Mapping[str, str]) -> Iterator[None]:
    """Makes a folder that of this tuning, or checks that it is, and keeps other processes out meanwhile."""
    from filelock import FileLock, Timeout

    winner, record = winner_of(spec), _record(tuning, goal, here)
    if winner.exists() and not (folder / "tuning.json").exists():
        raise SpecError(f"{winner} is there already, and would be written. Move it away")
    claim(folder, record, "tuning", "the trials of another spec, machine or version")
    lock = FileLock(folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise OutputBusy(f"another process is tuning in {folder}. Wait for it, or name another folder") from None


def _record(tuning: Tuning, goal: Goal, here: Mapping[str, str]) -> dict[str, Any]:
    """Returns what makes trials comparable: the spec, its prompts, the machine and the versions."""
    facts = {name: here[name] for name in ("processor", "gpu", "versions")}
    wanted = tuning.wanted.model_dump(mode="json")
    gates = [ready.pinned() for ready in goal.gates.values()]
    digest = hashlib.sha256(json.dumps([tuning.data, wanted, gates], sort_keys=True).encode()).hexdigest()
    return {"spec": digest, **facts}


def _best(trials: Sequence[Trial], goal: Goal) -> Trial:
    """Returns the best trial within the limits.

    Raises:
        SpecError: none ended.
        IllegalPlan: all were refused.
        QualityError: none keeps the limits.
    """
    kept = [trial for trial in trials if trial.outcome.end == "kept"]
    if kept:
        return min(kept, key=lambda trial: _cost(trial, goal.objective, goal))
    if not trials:
        raise SpecError("no trial ended before the timeout. Give more time")
    ends = Counter(trial.outcome.end for trial in trials)
    first = trials[0]
    reason = f"The first: {first.outcome.reason}"
    if ends["refused"] == len(trials):
        raise IllegalPlan(f"every trial was refused before it was built, {len(trials)} in all. {reason}")
    ended = ", ".join(f"{number} {end}" for end, number in ends.items())
    raise QualityError(f"no trial keeps the limits: {ended}. {reason}. Loosen the limits, or add milder choices")


def _cost(trial: Trial, name: str, goal: Goal) -> float:
    """Returns a measure with its sign so that lower is better; what was not measured is worst."""
    value = trial.outcome.measures.get(name)
    return float("inf") if value is None else -value if goal.rises(name) else value


def _write(path: Path, spec: Mapping[str, Any]) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


__all__ = ["Tuned", "tune", "unbeaten", "winner_of"]
