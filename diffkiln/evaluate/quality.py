"""What a bundle loses: its pictures beside those of the original pipeline, drawn from the same noise.

Everything that can be wrong is said before a weight is read. Then one side draws after the other, so that one pipeline
is in memory at a time. Pictures lie in a folder as they come: an evaluation that was killed goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from diffkiln.compiler.metrics import About, Metric
from diffkiln.errors import CallError, SpecError
from diffkiln.evaluate.album import Album, claim
from diffkiln.evaluate.choosing import backbones_of, check_computable, metrics_of
from diffkiln.evaluate.comparing import Drift, MetricResult, Pairs, drift_of, results_of
from diffkiln.evaluate.drawing import draw
from diffkiln.evaluate.machine import machine
from diffkiln.evaluate.prompts import MOST, Request, requests_of
from diffkiln.evaluate.ways import AS_DIFFUSERS, COMPILE, EAGER, Asked, Way, need_pictures, ways_of
from diffkiln.guards.gate import gated
from diffkiln.spec.prompts import read_prompts

Progress = Callable[[str], None]
#: So many requests are drawn once more, with another attention kernel, to know what noise alone does.
_FLOOR = 4
_OURS, _THEIRS, _AGAIN = "bundle", "reference", "floor"


@dataclass(frozen=True)
class Evaluation:
    """A bundle beside its reference.

    Attributes:
        bundle: the bundle's id.
        ways: the bundle and the reference.
        requests: what both drew.
        rows: the metrics.
        drift, floor: of each step, between the bundle and the reference, and between the reference and itself with
            other attention; empty where it was not measured.
        seconds: the time of each call, by side.
        machine: where it was measured.
        folder: the pictures of both sides; they are there while `evaluated` lasts, or were to be kept.
    """

    bundle: str
    ways: tuple[Way, Way]
    requests: tuple[Request, ...]
    rows: tuple[MetricResult, ...]
    drift: tuple[Drift, ...]
    floor: tuple[Drift, ...]
    seconds: Mapping[str, Sequence[float]]
    machine: Mapping[str, str]
    folder: Path

    @property
    def ours(self) -> Album:
        return Album(self.folder / _OURS)

    @property
    def theirs(self) -> Album:
        return Album(self.folder / _THEIRS)

    def as_json(self) -> dict[str, Any]:
        """Returns everything but the pictures as a JSON value."""
        return {
            "bundle": self.bundle,
            "reference": self.ways[1].name,
            "machine": dict(self.machine),
            "requests": [vars(request) for request in self.requests],
            "metrics": [row.as_json() for row in self.rows],
            "drift": [row.as_json() for row in self.drift] or None,
            "floor_drift": [row.as_json() for row in self.floor] or None,
        }


@gated("progress")
def evaluate(
    bundle: str | PathLike[str],
    against: str,
    prompts: str | PathLike[str] | Sequence[str],
    *,
    seeds: int = 1,
    metrics: Sequence[str] = (),
    backbones: Sequence[str] = (),
    keep: str | PathLike[str] | None = None,
    source: str | PathLike[str] | None = None,
    allow_native: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares a bundle's pictures with those of the original pipeline or of another bundle.

    Args:
        bundle: the bundle's directory.
        against: `eager`, or the directory of a bundle or of a model in diffusers' format.
        prompts: a text file with a prompt a line, or the prompts.
        seeds: how many pictures of each prompt, with seeds from 0.
        metrics: names, or dotted paths `package.module:function`; by default all that can be measured.
        backbones: `KIND=FOLDER` or `KIND=owner/name@commit`.
        keep: a folder where pictures stay; a later call with the same arguments goes on from them.
        source: the folder that the bundle was made from, where this machine does not know it.
        allow_native: load native code that this user did not build on this machine.
        device: as for `load`.
        progress: called with what is being done.

    Raises:
        SpecError: the prompts, the metrics or the sizes are wrong.
        SourceError: the source is not known, or is another model.
        CallError: the bundle makes no pictures, or takes more than prompts.
    """
    given = Comparison(str(against), seeds, tuple(metrics), tuple(backbones))
    with evaluated(
        Path(bundle), given, prompts, keep, Asked(allow_native, device, _path(source)), progress or (lambda _: None)
    ) as made:
        return made


@dataclass(frozen=True)
class Comparison:
    """The pictures that are compared, and the metrics."""

    against: str
    seeds: int = 1
    metrics: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()


@contextmanager
def evaluated(
    bundle: Path,
    given: Comparison,
    prompts: str | PathLike[str] | Sequence[str],
    keep: str | PathLike[str] | None,
    asked: Asked,
    progress: Progress,
) -> Iterator[Evaluation]:
    """Compares as `evaluate` does. The pictures are there inside the `with` block, and after it if they are kept."""
    requests = _requests(prompts, given.seeds)
    ours, theirs = _sides(bundle, given.against, asked)
    about = _about(ours, len(requests), given.backbones)
    metrics = metrics_of(given.metrics)
    if given.metrics:
        check_computable(metrics, about)
    with _folder(keep) as folder:
        claim(folder, _record(ours, theirs, requests))
        facts = machine()
        draw(ours, requests, Album(folder / _OURS), progress)
        draw(theirs, requests, Album(folder / _THEIRS), progress)
        few = requests[:_FLOOR] if theirs.job["kind"] == EAGER else []
        if few:
            draw(theirs, few, Album(folder / _AGAIN), progress, _other_attention)
        progress("compare")
        yield _compared(folder, (ours, theirs), requests, few, metrics, about, facts)


def _requests(prompts: str | PathLike[str] | Sequence[str], seeds: int) -> list[Request]:
    if seeds < 1:
        raise SpecError(f"{seeds} seeds draw nothing. Give 1 or more")
    texts = read_prompts(Path(prompts), most=MOST) if isinstance(prompts, str | PathLike) else list(prompts)
    if not texts or not all(text.strip() for text in texts):
        raise SpecError("prompts: there is none, or one is empty. Give texts")
    return requests_of(texts, seeds)


def _sides(bundle: Path, against: str, asked: Asked) -> tuple[Way, Way]:
    if against in (COMPILE, AS_DIFFUSERS):
        raise SpecError(f"--against {against} is for bench. Compare with eager, a bundle or a model's folder")
    ours, theirs = ways_of(bundle, (against,), asked)
    for way in (ours, theirs):
        check_drawable(way)
    return ours, theirs


def check_drawable(way: Way) -> None:
    """Checks that prompts alone make a way draw pictures.

    Raises:
        CallError: they do not.
    """
    need_pictures(way)
    if way.call.declared:
        raise CallError(
            f"{way.name} takes {', '.join(way.call.declared)} besides prompts, and evaluate gives prompts alone. "
            "Compare such bundles in Python, call by call"
        )


def _about(way: Way, count: int, backbones: Sequence[str]) -> About:
    size = way.call.size
    frames = int(size["num_frames"] or 1)
    return About(int(size["height"] or 0), int(size["width"] or 0), frames, count, backbones_of(backbones))


def _record(ours: Way, theirs: Way, requests: Sequence[Request]) -> dict[str, Any]:
    """Returns what an evaluation is of, so that pictures of another are not taken for its own."""
    fixed = hashlib.sha256(json.dumps(theirs.call.fixed, sort_keys=True).encode()).hexdigest()
    return {
        "bundle": ours.job["identity"],
        "reference": [theirs.job["kind"], theirs.job["identity"], fixed],
        "requests": [[request.prompt, request.seed] for request in requests],
    }


def _compared(
    folder: Path,
    ways: tuple[Way, Way],
    requests: Sequence[Request],
    few: Sequence[Request],
    metrics: Mapping[str, Metric],
    about: About,
    facts: Mapping[str, str],
) -> Evaluation:
    ours, theirs, again = (Album(folder / name) for name in (_OURS, _THEIRS, _AGAIN))
    _check_alike(ours, theirs)
    rows = list(results_of(metrics, Pairs(ours, theirs, requests), _true_size(about, ours)))
    if few:
        floors = results_of(metrics, Pairs(again, theirs, few), replace(_true_size(about, ours), count=len(few)))
        overall = [row.score.overall if row.score else None for row in floors]
        rows = [replace(row, floor=value) for row, value in zip(rows, overall, strict=True)]
    sides = {_OURS: ours, _THEIRS: theirs}
    seconds = {name: [album.get(number).seconds for number in range(len(requests))] for name, album in sides.items()}
    drift, floor = drift_of(ours, theirs, len(requests)), drift_of(again, theirs, len(few)) if few else []
    identity = str(ways[0].job["identity"])
    return Evaluation(identity, ways, tuple(requests), tuple(rows), tuple(drift), tuple(floor), seconds, facts, folder)


def _check_alike(ours: Album, theirs: Album) -> None:
    """Checks that the pictures of two albums are of one size, which specs may leave open.

    Raises:
        SpecError: they are not.
    """
    sides = [" x ".join(map(str, album.get(0).picture.shape[-2:])) for album in (ours, theirs)]
    if sides[0] != sides[1]:
        raise SpecError(
            f"the bundle's pictures are {sides[0]} and the reference's {sides[1]}, so they cannot be compared. Compare "
            "with a pipeline that makes pictures of the same size"
        )


def _true_size(about: About, album: Album) -> About:
    """Returns the size that the pictures have, which a spec may leave open."""
    frames, _, height, width = album.get(0).picture.shape
    return replace(about, height=height, width=width, frames=frames)


@contextmanager
def _folder(keep: str | PathLike[str] | None) -> Iterator[Path]:
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="diffkiln-evaluate-") as made:
        yield Path(made)


def _other_attention() -> Any:
    """Returns a context in which attention is computed by torch's plain operations, and not by a fused kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _path(value: str | PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)
