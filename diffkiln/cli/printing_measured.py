"""Prints measurements as plain tables of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from diffkiln.cli.printing import print_table, show, size_of

if TYPE_CHECKING:
    from diffkiln.evaluate.bench import Bench, Measured
    from diffkiln.evaluate.comparing import MetricResult
    from diffkiln.evaluate.numbers import Spread
    from diffkiln.evaluate.quality import Evaluation
    from diffkiln.evaluate.tune import Tuned

_NOT_MEASURED = "not measured"
#: Ways that stand in one table.
_BESIDE = 3
_WIDTH, _NAME = 80, 19

#: The rows of the table: the quantity, and its words.
_ROWS = {
    "start": "start to image",
    "load": "load",
    "call": "call",
    "encode": "  encode",
    "denoise": "  denoise",
    "decode": "  decode",
    "step": "  one step",
}


def print_bench(measured: Bench) -> None:
    """Prints what was measured, the ways side by side."""
    for first in range(0, len(measured.ways), _BESIDE):
        ways = measured.ways[first : first + _BESIDE]
        rows = [[words, *(seconds_of(way.seconds[name]) for way in ways)] for name, words in _ROWS.items()]
        rows += _predicted(ways)
        rows += _memory(ways)
        print_table(("", *(_short(way.name) for way in ways)), rows)
        show()
    print_machine(measured.machine)
    rounds = measured.rounds
    print_line(f"{rounds.starts} starts, {rounds.runs} calls after {rounds.warmup}; median (lowest–highest)")


def print_evaluation(made: Evaluation) -> None:
    """Prints the metrics, the drift of the latents, and what was not measured."""
    show(f"{_short(made.ways[0].name)} against {_short(made.ways[1].name)}, {len(made.requests)} pictures")
    rows = [[row.name, *_numbers(row), row.better] for row in made.rows if row.score]
    print_table(("metric", "all", "worst", "reference", "floor", "better"), rows)
    show()
    if made.drift:
        floor = made.floor or [None] * len(made.drift)
        steps = [
            [str(drift.step), f"{drift.relative:.2e}", f"{drift.cosine:.6f}", f"{noise.relative:.2e}" if noise else ""]
            for drift, noise in zip(made.drift, floor, strict=True)
        ]
        print_table(("step", "relative L2", "cosine", "floor"), steps)
        show()
    else:
        print_line("drift of the latents: not measured, since the steps of both are not alike or not told")
    for row in made.rows:
        if row.score is None:
            print_line(f"{row.name}: {_NOT_MEASURED}; {row.reason}")
    print_machine(made.machine)


def _numbers(row: MetricResult) -> list[str]:
    assert row.score is not None
    each = row.score.each
    worst = (min(each) if row.better == "higher" else max(each)) if each else None
    unit = f" {row.unit}" if row.unit else ""
    numbers = [row.score.overall, worst, row.score.reference, row.floor]
    return ["" if number is None else f"{number:.5g}{unit}" for number in numbers]


def print_tuned(tuned: Tuned) -> None:
    """Prints the trials, what each chose, and why some were not measured or do not keep the limits."""
    from diffkiln.evaluate.tuned import ended, shown

    names = tuned.goal.measures
    rows = [
        [str(trial.number), *(shown(trial, name, unit=True) for name in names), ended(tuned, trial)]
        for trial in tuned.trials
    ]
    print_table(("trial", *names, "ended"), rows)
    show()
    for trial in tuned.trials:
        reason = f" – {trial.outcome.reason}" if trial.outcome.reason else ""
        print_line(f"{trial.number}: {tuned.in_words(trial)}{reason}")
    show()
    show(f"{len(tuned.trials)} of {tuned.combinations} combinations; best {tuned.goal.objective}: {tuned.best.number}")
    print_machine(tuned.machine)


def print_machine(facts: Mapping[str, str]) -> None:
    """Prints where it was measured."""
    from diffkiln.evaluate.machine import in_a_line

    print_line(in_a_line(facts))


def print_line(text: str) -> None:
    """Prints a paragraph, wrapped to 80 columns."""
    for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False):
        show(line)


def seconds_of(found: Spread | None) -> str:
    """Returns a time with its spread: in seconds, or in milliseconds if it is shorter than one."""
    if found is None:
        return _NOT_MEASURED
    unit, factor = ("s", 1.0) if found.median >= 1 else ("ms", 1e3)
    median, lowest, highest = (value * factor for value in (found.median, found.lowest, found.highest))
    return f"{median:.3g} ({lowest:.3g}–{highest:.3g}) {unit}"


def _predicted(ways: Sequence[Measured]) -> Iterator[list[str]]:
    """Yields the least times that this machine's arithmetic, memory and link allow, beside those that were measured."""
    for name, words in {"call": "predicted call", "step": "  predicted step"}.items():
        if any(name in way.predicted for way in ways):
            found = [way.predicted.get(name) for way in ways]
            yield [words, *("" if seconds is None else f"≥ {in_unit(seconds)}" for seconds in found)]


def in_unit(seconds: float) -> str:
    """Returns a time in seconds, or in milliseconds if it is shorter than one."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _memory(ways: Sequence[Measured]) -> list[list[str]]:
    def sizes(values: Sequence[int | None]) -> list[str]:
        return [_NOT_MEASURED if value is None else size_of(value) for value in values]

    speeds = [f"{way.throughput.median:.3g} a second" if way.throughput else _NOT_MEASURED for way in ways]
    return [
        ["images", *speeds],
        ["peak of the host", *sizes([way.host for way in ways])],
        ["peak of the GPU", *sizes([way.device for way in ways])],
        ["planned", *sizes([way.planned for way in ways])],
        ["weights", *sizes([sum(way.weights.values()) or None for way in ways])],
        ["weights moved", *sizes([way.moved for way in ways])],
        *_energy(ways),
    ]


def _energy(ways: Sequence[Measured]) -> Iterator[list[str]]:
    from diffkiln.evaluate.energy import SOURCES

    for source, words in SOURCES.items():
        in_words = [way.joules.get(source) for way in ways]
        yield [words, *(_NOT_MEASURED if joules is None else f"{joules:.3g} J an image" for joules in in_words)]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
