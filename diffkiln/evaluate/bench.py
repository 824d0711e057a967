"""Measures how fast a bundle is and how much memory it takes, beside other ways to draw the same.

Each way has a process of its own, so that its memory is its own and nothing is warm but what it warmed. First each way
is started several times, from the start of the process to its first image. Then one process of each way stays, and they
take turns, forwards and backwards: A, B, B, A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from diffkiln.bundle import open_bundle
from diffkiln.evaluate.ceilings import ceilings_here
from diffkiln.evaluate.energy import SOURCES
from diffkiln.evaluate.machine import machine
from diffkiln.evaluate.numbers import Spread, spread_of
from diffkiln.evaluate.processes import Started, started
from diffkiln.evaluate.ways import Asked, Way, ways_of
from diffkiln.guards.gate import gated
from diffkiln.program.moments import PHASES
from diffkiln.runtime.targets import device_for

#: Called with what is being measured when that begins.
Progress = Callable[[str], None]
_PROMPT = "a photograph of a red fox in the snow"


@dataclass(frozen=True)
class Rounds:
    """The number of runs of each kind.

    Attributes:
        starts: fresh processes of each way; 0 measures no starts.
        warmup: calls that do not count.
        runs: calls that count.
    """

    starts: int = 3
    warmup: int = 3
    runs: int = 5


@dataclass(frozen=True)
class Measured:
    """The numbers of one way. A number is None where it was not measured.

    Attributes:
        name: of the way.
        seconds: by quantity: "start" (process start to first image), "load", "call", "encode", "denoise", "decode",
            and "step".
        throughput: images (or videos) a second.
        host, device, reserved: the most memory in bytes: of the process, of torch's tensors on the GPU, and held for
            them.
        weights: bytes of the weights, by component.
        moved: bytes of weights that a call brings to the device.
        planned: the most bytes of a call for weights, constants and results, as `plan_memory` has it.
        predicted: the least seconds of a "call", a "step" and the phases, from the arithmetic, the memory and the link
            of this machine; empty where no plan is made, or nothing is known of the machine.
        joules: energy for an image by source, "cpu" and "gpu": all that the processors and the GPU took during the
            calls, as their drivers count it; without those that tell nothing.
    """

    name: str
    seconds: Mapping[str, Spread | None]
    throughput: Spread | None
    host: int | None
    device: int | None
    reserved: int | None
    weights: Mapping[str, int] = field(default_factory=dict)
    moved: int | None = None
    planned: int | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    joules: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers by their names; null where nothing was measured."""
        seconds = {name: found.as_json() if found else None for name, found in self.seconds.items()}
        return {
            "name": self.name,
            "seconds": seconds,
            "images_per_second": self.throughput.as_json() if self.throughput else None,
            "peak_bytes": {"host": self.host, "device": self.device, "device_reserved": self.reserved},
            "weights_bytes": dict(self.weights) or None,
            "planned_bytes": self.planned,
            "predicted_seconds": dict(self.predicted) or None,
            "bytes_moved": self.moved,
            "joules_per_image": dict(self.joules) or None,
        }


@dataclass(frozen=True)
class Bench:
    """The measurements of a bundle and of the ways that it is compared with; the bundle is the first.

    Attributes:
        bundle: the bundle's id.
        ways: the numbers of each.
        machine: where it was measured, with the versions, as words.
        rounds: how often.
        call: the keywords that the variant fixes.
    """

    bundle: str
    ways: tuple[Measured, ...]
    machine: Mapping[str, str]
    rounds: Rounds
    call: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Returns everything as a JSON value."""
        return {
            "bundle": self.bundle,
            "machine": dict(self.machine),
            "rounds": vars(self.rounds),
            "call": dict(self.call),
            "ways": [way.as_json() for way in self.ways],
        }


@gated("progress")
def bench(
    bundle: str | PathLike[str],
    against: Sequence[str] = (),
    *,
    prompt: str | None = None,
    rounds: Rounds | None = None,
    seed: int = 7,
    source: str | PathLike[str] | None = None,
    allow_native: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measures a bundle's first variant beside other ways to draw the same.

    Args:
        bundle: the bundle's directory.
        against: `eager` (diffusers), `compile` (diffusers with its repeated blocks compiled), `as_diffusers` (the
            bundle loaded so), or directories of bundles or of models in diffusers' format.
        prompt: the prompt of every call; by default one of a fox.
        rounds: how often; by default 3 starts, 3 calls that do not count, and 5 that do, or 10 on a GPU.
        seed: of the noise.
        source: the folder that the bundle was made from, where this machine does not know it.
        allow_native: load native code that this user did not build on this machine.
        device: as for `load`.
        progress: called with what is being measured.

    Raises:
        SpecError: a way does not exist, or makes pictures of another size.
        SourceError: the source is not known, or is another model.
        Incompatible: a way cannot be loaded or run on this machine.
    """
    say = progress or (lambda _: None)
    asked = Asked(allow_native, device, Path(source) if source is not None else None)
    ways = ways_of(Path(bundle), tuple(against), asked)
    facts = machine()
    rounds = rounds or Rounds(runs=5 if facts["gpu"] == "none" else 10)
    prompts = [prompt or _PROMPT] * ways[0].call.batch
    starts: dict[str, list[float]] = {way.name: [] for way in ways}
    loads: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(rounds.starts):
        for way in _in_turn(ways, turn):
            say(f"start {turn + 1} of {rounds.starts}: {way.name}")
            with started(way, prompts, seed) as begun:
                starts[way.name].append(begun.seconds)
                loads[way.name].append(begun.load)
    calls = _calls(ways, prompts, seed, rounds, say)
    measured = [_measured(way, starts[way.name], loads[way.name], calls[way.name]) for way in ways]
    measured = [replace(row, predicted=_predicted(way)) for row, way in zip(measured, ways, strict=True)]
    return Bench(str(ways[0].job["identity"]), tuple(measured), facts, rounds, ways[0].call.fixed)


def _in_turn(ways: Sequence[Any], turn: int) -> Sequence[Any]:
    """Returns the ways in the order of a round: forwards and backwards in turn."""
    return ways if turn % 2 == 0 else ways[::-1]


def _calls(
    ways: Sequence[Way], prompts: Sequence[str], seed: int, rounds: Rounds, say: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Returns what each counted call of each way took."""
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    if not rounds.runs:
        return found
    with ExitStack() as stack:
        processes: list[Started] = []
        for way in ways:
            say(f"load {way.name}")
            processes.append(stack.enter_context(started(way, prompts, seed)))
        for turn in range(rounds.warmup + rounds.runs):
            say(f"call {turn + 1} of {rounds.warmup + rounds.runs}")
            for process in _in_turn(processes, turn):
                row = process.run()
                if turn >= rounds.warmup:
                    found[process.way.name].append(row)
    return found


def _measured(
    way: Way, starts: Sequence[float], loads: Sequence[float], calls: Sequence[Mapping[str, Any]]
) -> Measured:
    totals = [row["total"] for row in calls]
    seconds = {"start": spread_of(starts), "load": spread_of(loads), "call": spread_of(totals)}
    for phase in PHASES:
        seconds[phase] = spread_of([row["phases"][phase] for row in calls if row["phases"]])
    seconds["step"] = spread_of([step for row in calls for step in row["steps"]])
    images = way.call.batch * int(way.call.fixed.get("num_images_per_prompt") or 1)

    def most(name: str) -> int | None:
        return max((row[name] for row in calls if row[name] is not None), default=None)

    throughput = spread_of([images / total for total in totals])
    peaks = most("host"), most("device"), most("reserved")
    joules = {
        source: sum(row["joules"][source] for row in calls) / images / len(calls) for source in _energy_sources(calls)
    }
    planned = way.planned.residency.peak if way.planned is not None else None
    moved = most("moved")
    return Measured(way.name, seconds, throughput, *peaks, way.weights, moved, planned, joules=joules)


def _predicted(way: Way) -> Mapping[str, float]:
    """Returns the least seconds of a way's call on this machine."""
    if way.planned is None:
        return {}
    with open_bundle(way.job["path"]) as bundle:
        device = device_for(bundle.manifest, way.job["device"])
        rows = [row for rows in bundle.manifest.weights.values() for row in rows]
    largest = max(rows, key=lambda row: row.bytes, default=None)
    file = None
    if largest is not None and way.planned.residency.brought:
        file = str(Path(way.job["path"]) / largest.file)
    return way.planned.seconds(ceilings_here(device, file)) or {}


def _energy_sources(calls: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Returns the sources whose drivers told the energy of all calls."""
    return [source for source in SOURCES if calls and all(source in row["joules"] for row in calls)]
