"""What was measured, one JSON line a process, so that an interrupted run goes on where it was; and the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import median, spread, table

_RATIOS = ("load", "first picture", "each", "CPU s to load", "CPU s to first", "peak memory")


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        load, first: seconds from the process's start until it has loaded, and until the first image is there.
        each: seconds of every further image.
        cpu_load, cpu_first: CPU seconds (user and system) of the process until then.
        peak: its highest resident memory in bytes.
        failed: why there is nothing of this.
    """

    pipeline: str
    way: str
    round: int
    load: float = 0.0
    first: float = 0.0
    each: tuple[float, ...] = ()
    cpu_load: float = 0.0
    cpu_first: float = 0.0
    peak: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Prepared:
    """What a way needs before its first process: seconds, bytes on the disk, and the versions that it runs with."""

    pipeline: str
    way: str
    seconds: float = 0.0
    size: int = 0
    versions: str = ""
    failed: str = ""


class Results:
    """The records in a file, which grows by one line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.segments = [Run(**row) for row in rows if "round" in row]
        self.prepared = [Prepared(**row) for row in rows if "round" not in row]

    def add(self, record: Run | Prepared) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if isinstance(record, Run):
            self.segments.append(record)
        else:
            self.prepared.append(record)

    def forget(self, ways: Iterable[str], pipelines: Iterable[str]) -> None:
        """Drops the runs of these ways, so that they are measured again. What was prepared stays."""
        gone = {(pipeline, way) for pipeline in pipelines for way in ways}
        self.segments = [run for run in self.segments if (run.pipeline, run.way) not in gone]
        lines = [json.dumps(asdict(record)) for record in (*self.prepared, *self.segments)]
        self._path.write_text("".join(line + "\n" for line in lines))

    def has(self, pipeline: str, way: str, number: int) -> bool:
        """Returns True if the run is there, or need not be tried since the way has failed."""
        mine = [run for run in self.segments if (run.pipeline, run.way) == (pipeline, way)]
        return any(run.round == number or run.failed for run in mine)

    def preparation(self, pipeline: str, way: str) -> Prepared | None:
        found = [row for row in self.prepared if (row.pipeline, row.way) == (pipeline, way)]
        return found[-1] if found else None


def render(results: Results, pipeline: str, ways: Sequence[str]) -> str:
    """Returns the tables of one pipeline. Ratios are of runs in the same round."""
    rows, ratios, failures = [], [], []
    eager = _by_round(results, pipeline, "eager")
    for way in ways:
        prepared = results.preparation(pipeline, way)
        runs = _by_round(results, pipeline, way)
        reasons = [run.failed for run in results.segments if (run.pipeline, run.way) == (pipeline, way) and run.failed]
        if prepared is not None and prepared.failed:
            reasons.append(prepared.failed)
        if reasons:
            failures.append(f"- {way}: {reasons[0]}")
        if not runs or prepared is None:
            continue
        rows.append(_row(way, prepared, list(runs.values())))
        ratios.append(_ratios(way, runs, eager))
    columns = (
        "way",
        "load",
        "first picture",
        "each",
        "CPU s to load, to first",
        "peak memory",
        "on disk",
        "runs",
        "made in",
    )
    parts = [table(columns, rows), table(("× eager", *_RATIOS), ratios)]
    if failures:
        parts.append("Not run:\n\n" + "\n".join(failures))
    return "\n\n".join(parts)


def _by_round(results: Results, pipeline: str, way: str) -> dict[int, Run]:
    """The good runs of a way by round; round 0, which warms caches, does not count."""
    mine = [run for run in results.segments if (run.pipeline, run.way) == (pipeline, way)]
    return {run.round: run for run in mine if run.round and not run.failed}


def _row(way: str, prepared: Prepared, runs: Sequence[Run]) -> tuple[object, ...]:
    def seconds(of: Callable[[Run], float]) -> str:
        values = [of(run) for run in runs]
        return f"{median(values):.1f} s ({spread(values)})"

    cpu = f"{median([run.cpu_load for run in runs]):.1f}, {median([run.cpu_first for run in runs]):.1f}"
    return (
        way,
        seconds(lambda run: run.load),
        seconds(lambda run: run.first),
        seconds(lambda run: median(run.each)),
        cpu,
        f"{median([run.peak for run in runs]) / 1e9:.2f} GB",
        f"{prepared.size / 1e9:.2f} GB",
        len(runs),
        f"{prepared.seconds:.0f} s",
    )


def _ratios(way: str, runs: dict[int, Run], eager: dict[int, Run]) -> tuple[object, ...]:
    shared = sorted(runs.keys() & eager.keys())

    def ratio(of: Callable[[Run], float]) -> str:
        if not shared:
            return "–"
        return f"{median([of(runs[number]) / of(eager[number]) for number in shared]):.2f}"

    return (
        way,
        ratio(lambda run: run.load),
        ratio(lambda run: run.first),
        ratio(lambda run: median(run.each)),
        ratio(lambda run: run.cpu_load),
        ratio(lambda run: run.cpu_first),
        ratio(lambda run: run.peak),
    )
