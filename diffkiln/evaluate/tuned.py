"""A tuning as one page for a browser: the trials, those that are unbeaten, and the spec that is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from diffkiln.evaluate.charts import scatter
from diffkiln.evaluate.report import needs_packages
from diffkiln.evaluate.study import Trial
from diffkiln.evaluate.trials import Goal
from diffkiln.evaluate.tune import Tuned
from diffkiln.spec.tuning import BYTES, COSTS, LATENCY, MEMORY

#: The units in which people read costs: their names, and how many of them one is.
_UNITS: Mapping[str, tuple[str, float]] = {LATENCY: ("ms", 1e3), MEMORY: ("MB", 1e-6), BYTES: ("MB", 1e-6)}


def page(tuned: Tuned) -> str:
    """Returns the page as HTML.

    Raises:
        MissingDependency: what draws it is not installed.
    """
    needs_packages()
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader("diffkiln.evaluate", "."), autoescape=True, trim_blocks=True)
    goal = tuned.goal
    return pages.get_template("tuned.html").render(
        title=f"Tuning of {tuned.path.name.removesuffix('-tuned.json')}",
        best_is="highest" if goal.rises(goal.objective) else "lowest",
        objective=goal.objective,
        combinations=tuned.combinations,
        cards=[{"name": name, "value": shown(tuned.best, name, unit=True)} for name in goal.measures],
        limits=list(limits_of(goal)),
        charts=list(_charts(tuned)),
        measures=[f"{name}, {_UNITS[name][0]}" if name in _UNITS else name for name in goal.measures],
        trials=[_row(tuned, trial) for trial in tuned.trials],
        spec=tuned.path.read_text(encoding="utf-8"),
        machine=tuned.machine,
    )


def shown(trial: Trial, name: str, unit: bool = False) -> str:
    """Returns a measure of a trial as people read it; empty if there is none."""
    value = trial.outcome.measures.get(name)
    if value is None:
        return ""
    words, factor = _UNITS.get(name, ("", 1.0))
    return f"{value * factor:.4g}{f' {words}' if unit and words else ''}"


def ended(tuned: Tuned, trial: Trial) -> str:
    """Returns in a word how a trial ended: best, unbeaten, kept, missed, refused or failed."""
    if trial.number == tuned.best.number:
        return "best"
    return "unbeaten" if trial.number in tuned.unbeaten else trial.outcome.end


def limits_of(goal: Goal) -> Iterator[str]:
    """Yields the limits in words."""
    for name in COSTS:
        limit = getattr(goal.limits, name)
        if limit is not None:
            words, factor = _UNITS[name]
            yield f"{name} at most {limit * factor:.4g} {words}"
    yield from (f"{ready.words}, on {len(ready.prompts)} pictures" for ready in goal.gates.values())


def _row(tuned: Tuned, trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "cells": [shown(trial, name) for name in tuned.goal.measures],
        "ended": ended(tuned, trial),
        "chosen": tuned.in_words(trial),
        "reason": trial.outcome.reason,
    }


def _charts(tuned: Tuned) -> Iterator[dict[str, str]]:
    goal = tuned.goal
    names = [name for name in goal.measures if name != BYTES or goal.objective == BYTES]
    pairs = [pair for pair in combinations(names, 2) if goal.objective in pair]
    for one, other in pairs:
        across, up = (one, other) if one == goal.objective else (other, one)
        if points := _points(tuned, across, up):
            svg = scatter(points, _axis(across), _axis(up))
            yield {"svg": svg, "caption": f"{up} over {across}, by the trials' numbers."}


def _points(tuned: Tuned, across: str, up: str) -> dict[str, list[tuple[float, float, str]]]:
    found: dict[str, list[tuple[float, float, str]]] = {}
    for trial in tuned.trials:
        measures = trial.outcome.measures
        if across in measures and up in measures:
            point = _in_units(measures, across), _in_units(measures, up), str(trial.number)
            found.setdefault(ended(tuned, trial), []).append(point)
    return found


def _in_units(measures: Mapping[str, float], name: str) -> float:
    return measures[name] * _UNITS.get(name, ("", 1.0))[1]


def _axis(name: str) -> str:
    return f"{name}, {_UNITS[name][0]}" if name in _UNITS else name
