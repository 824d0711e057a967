"""An evaluation as one page for a browser: pictures, charts and numbers in one file, which asks nobody for anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffkiln.bundle.evidence import Costs, costs_of, sizes_of
from diffkiln.errors import MissingDependency
from diffkiln.evaluate.album import Album
from diffkiln.evaluate.bench import Bench
from diffkiln.evaluate.charts import bars, lines, waterfall
from diffkiln.evaluate.comparing import MetricResult
from diffkiln.evaluate.energy import SOURCES
from diffkiln.evaluate.numbers import Spread
from diffkiln.evaluate.phases import PHASES
from diffkiln.evaluate.quality import Evaluation
from diffkiln.program.schedule import Step, line

#: A page with more pictures is slow to open on a phone.
MOST_PAIRS = 24
#: Pictures with shorter sides are shown with their pixels.
_SMALL = 128
_KINDS = {"●": ("all", "all blocks"), "◐": ("some", "some blocks"), "○": ("none", "none"), "·": ("none", "another's")}

#: variant → component → its steps, as `inspect` shows them.
Schedules = Mapping[str, Mapping[str, Sequence[Step]]]


def needs_packages() -> None:
    """Checks that what draws the report is installed.

    Raises:
        MissingDependency: it is not.
    """
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise MissingDependency(f"the report needs {', '.join(missing)}: pip install 'diffkiln[evaluate]'")


def report(
    made: Evaluation,
    bench: Bench | None = None,
    schedules: Schedules | None = None,
    build: Mapping[str, Any] | None = None,
) -> str:
    """Returns the page as HTML.

    Args:
        made: the evaluation, while its pictures are there.
        bench: speed and memory of both sides.
        schedules: what each step of the bundle computes.
        build: the content of the bundle's `build.json`, which has what each pass cost.
    """
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader("diffkiln.evaluate", "."), autoescape=True, trim_blocks=True)
    ours, theirs = (way.name for way in made.ways)
    costs = costs_of(build or {})
    chosen = _worst(made)
    some = f"The {len(chosen)} worst are shown." if len(chosen) < len(made.requests) else ""
    measured = [row for row in made.rows if row.score]
    each = [row for row in measured if row.score and row.score.each]
    return pages.get_template("report.html").render(
        title=f"{ours} against {theirs}",
        identity=made.bundle,
        count=len(made.requests),
        ours=ours,
        theirs=theirs,
        cards=list(_cards(measured, bench)),
        metrics=[{"name": row.name, "better": row.better, "cells": _cells(row)} for row in measured],
        gates=[f"{table.metric} {table.gate}" for table in costs],
        shown=some,
        pairs=[_pair(made, number, each) for number in chosen],
        charts=list(_charts(made, bench, costs, sizes_of(build or {}))),
        timelines=list(_timelines(schedules or {})),
        each_names=[row.name for row in each],
        each=[_line(made, number, each) for number in range(len(made.requests))],
        machine=made.machine,
        missing=list(_missing(made, bench, costs)),
    )


def _cards(measured: Sequence[MetricResult], bench: Bench | None) -> Iterator[dict[str, str]]:
    for row in measured[:4]:
        assert row.score is not None
        yield {"name": row.name, "value": f"{row.score.overall:.5g} {row.unit}".strip()}
    if bench is None:
        return
    ours, theirs = bench.ways[:2]
    for name, words in (("start", "start to first image"), ("call", "a call")):
        one, other = ours.seconds[name], theirs.seconds[name]
        if one and other:
            yield {"name": f"{words}, times the speed", "value": f"{other.median / one.median:.2f} ×"}
    if ours.host and theirs.host:
        yield {"name": "peak memory of the host", "value": f"{ours.host / theirs.host:.2f} ×"}


def _cells(row: MetricResult) -> list[str]:
    assert row.score is not None
    each = row.score.each
    worst = (min(each) if row.better == "higher" else max(each)) if each else None
    return [_shown(value) for value in (row.score.overall, worst, row.score.reference, row.floor)]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


# -- pictures --


def _worst(made: Evaluation) -> list[int]:
    """Returns the numbers of the pictures that are shown: those that lost most, by PSNR where it was measured."""
    rows = [row for row in made.rows if row.score and row.score.each]
    numbers = list(range(len(made.requests)))
    if len(numbers) <= MOST_PAIRS or not rows or rows[0].score is None:
        return numbers[:MOST_PAIRS]
    row = next((row for row in rows if row.name == "psnr"), rows[0])
    values = row.score.each if row.score else ()
    sign = 1 if row.better == "higher" else -1
    return sorted(numbers, key=lambda number: sign * values[number])[:MOST_PAIRS]


def _pair(made: Evaluation, number: int, each: Sequence[MetricResult]) -> dict[str, Any]:
    ours, theirs = _frame(made.ours, number), _frame(made.theirs, number)
    difference = (ours - theirs).abs()
    gain = _gain(float(difference.max()))
    request = made.requests[number]
    named = zip((row.name for row in each), _line(made, number, each)["cells"], strict=True)
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "numbers": ", ".join(f"{name} {value}" for name, value in named),
        "gain": gain,
        "small": min(ours.shape[-2:]) < _SMALL,
        "ours": _as_data(ours),
        "theirs": _as_data(theirs),
        "difference": _as_data(difference * gain),
    }


def _gain(largest: float) -> int:
    """Returns the power of two that makes the largest difference nearly white."""
    gain = 1
    while largest * gain * 2 <= 1 and gain < 256:
        gain *= 2
    return gain


def _frame(album: Album, number: int) -> torch.Tensor:
    return album.get(number).picture[0].clamp(0, 1)


def _as_data(picture: torch.Tensor) -> str:
    """Returns a picture [3, height, width] as an address that holds it."""
    from PIL import Image

    pixels = (picture.clamp(0, 1).movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(made.getvalue()).decode()}"


def _line(made: Evaluation, number: int, each: Sequence[MetricResult]) -> dict[str, Any]:
    request = made.requests[number]
    cells = [_shown(row.score.each[number]) for row in each if row.score]
    return {"prompt": request.prompt, "seed": request.seed, "cells": cells}


# -- charts --


def _charts(
    made: Evaluation, bench: Bench | None, costs: Sequence[Costs], sizes: Mapping[str, Mapping[str, float]]
) -> Iterator[dict[str, str]]:
    if made.drift:
        series = {"bundle": [step.relative for step in made.drift]}
        if made.floor:
            series["floor"] = [step.relative for step in made.floor]
        shown = {name: [max(value, 1e-12) for value in values] for name, values in series.items()}
        caption = "How far the latents are from the reference's after each step."
        yield {"svg": lines(shown, "step", "relative L2"), "caption": caption}
    if bench is not None:
        yield from _speed(bench)
    weights = {way.name: {name: size / 1e6 for name, size in way.weights.items()} for way in made.ways if way.weights}
    if weights:
        yield {"svg": bars(weights, "MB"), "caption": "Weights by component."}
    if len(sizes) > 1:
        passed = {name: {part: size / 1e6 for part, size in row.items()} for name, row in sizes.items()}
        yield {"svg": bars(passed, "MB"), "caption": "Weights by component, after each pass that changed them."}
    for table in costs:
        rows = [(name, value) for name, value in table.cumulative if value is not None]
        if rows:
            caption = f"{table.metric} after each pass, and of the finished bundle. Dashed: the gate."
            yield {"svg": waterfall(rows, table.metric, table.floor), "caption": caption}


def _speed(bench: Bench) -> Iterator[dict[str, str]]:
    def seconds(found: Spread | None) -> float:
        return found.median * 1e3 if found else 0.0

    phased = {way.name: {name: seconds(way.seconds[name]) for name in PHASES} for way in bench.ways}
    if all(way.seconds[PHASES[0]] for way in bench.ways):
        yield {"svg": bars(phased, "ms"), "caption": "One call by its phases, medians."}
    elif all(way.seconds["call"] for way in bench.ways):
        calls = {way.name: {"call": seconds(way.seconds["call"])} for way in bench.ways}
        yield {"svg": bars(calls, "ms"), "caption": "One call, medians."}
    starts = {way.name: {"start": seconds(way.seconds["start"]) / 1e3} for way in bench.ways}
    if all(way.seconds["start"] for way in bench.ways):
        yield {"svg": bars(starts, "s"), "caption": "Start of the process to the first image, medians."}
    energy = {way.name: {SOURCES[name]: joules for name, joules in way.joules.items()} for way in bench.ways}
    if all(energy.values()):
        yield {"svg": bars(energy, "J"), "caption": "Energy for an image, of all that ran meanwhile."}
    peaks = {way.name: {"host": (way.host or 0) / 1e6, "GPU": (way.device or 0) / 1e6} for way in bench.ways}
    if any(way.host for way in bench.ways):
        yield {"svg": bars(peaks, "MB"), "caption": "Peak memory of the process, and of the GPU if there is one."}


def _timelines(schedules: Schedules) -> Iterator[dict[str, Any]]:
    for variant, components in schedules.items():
        for component, steps in components.items():
            symbols = zip(steps, line(list(steps)), strict=True)
            shown = [
                {"number": step.number + 1, "kind": _KINDS[symbol][0], "words": _KINDS[symbol][1]}
                for step, symbol in symbols
            ]
            yield {"name": f"{component}, {variant}", "steps": shown}


# -- what is missing --


def _missing(made: Evaluation, bench: Bench | None, costs: Sequence[Costs]) -> Iterator[str]:
    for row in made.rows:
        if row.score is None:
            yield f"{row.name}: {row.reason}"
    if not made.drift:
        yield "drift of the latents: the steps of both sides are not alike, or not told"
    if not made.floor:
        yield "noise floor: it is of eager diffusers alone"
    if bench is None:
        yield "speed and memory"
    else:
        yield from (f"peak memory of the GPU, {way.name}" for way in bench.ways if way.device is None)
        for source, words in SOURCES.items():
            yield from (f"{words}, {way.name}: no driver tells it" for way in bench.ways if source not in way.joules)
    if not costs:
        yield "what each pass cost: the spec has no quality gates"
