"""Two albums compared: every metric, and how far the latents drift apart from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffkiln.compiler.metrics import About, Metric, Pair, Score
from diffkiln.evaluate.album import Album
from diffkiln.evaluate.prompts import Request


class Pairs(Sequence[Pair]):
    """The pairs of two albums, read one at a time."""

    def __init__(self, ours: Album, theirs: Album, requests: Sequence[Request]) -> None:
        self._ours, self._theirs, self._requests = ours, theirs, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        ours, theirs = self._ours.get(number), self._theirs.get(number)
        return Pair(ours.picture, theirs.picture, self._requests[number].prompt)


@dataclass(frozen=True)
class MetricResult:
    """One metric of an evaluation.

    Attributes:
        name, unit, better: of the metric.
        score: None where it was not measured.
        reason: why not.
        floor: the metric between the reference and the reference with other attention; None where there is none.
    """

    name: str
    unit: str
    better: str
    score: Score | None = None
    reason: str = ""
    floor: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the row by its fields; null where nothing was measured."""
        entry = {"name": self.name, "unit": self.unit, "better": self.better, "floor": short(self.floor)}
        if self.score is None:
            return {**entry, "overall": None, "reason": self.reason}
        each = [short(value) for value in self.score.each]
        reference = short(self.score.reference)
        return {**entry, "overall": short(self.score.overall), "each": each, "reference": reference}


@dataclass(frozen=True)
class Drift:
    """The distance of the latents after one step: mean and worst over the pictures.

    Attributes:
        relative: the norm of the difference over the norm of the reference.
        cosine: of the angle between both.
    """

    step: int
    relative: float
    worst_relative: float
    cosine: float
    worst_cosine: float

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers by their names."""
        return {name: value if name == "step" else short(value) for name, value in vars(self).items()}


def results_of(metrics: Mapping[str, Metric], pairs: Sequence[Pair], about: About) -> Iterator[MetricResult]:
    """Yields each metric's numbers, or why there are none."""
    for name, metric in metrics.items():
        reason = metric.objection(about)
        score = None if reason else metric.score(pairs, about)
        yield MetricResult(name, metric.unit, metric.better, score, reason)


def drift_of(ours: Album, theirs: Album, count: int) -> list[Drift]:
    """Returns the drift of each step; empty where the steps of both are not alike, or not told."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number in range(count):
        one, other = ours.get(number).latents, theirs.get(number).latents
        if one.shape != other.shape or not one.numel():
            return []
        found.append(_apart(one.flatten(1).double(), other.flatten(1).double()))
    relative, cosine = (torch.stack(list(values)) for values in zip(*found, strict=True))
    return [
        Drift(step + 1, float(far.mean()), float(far.max()), float(near.mean()), float(near.min()))
        for step, (far, near) in enumerate(zip(relative.T, cosine.T, strict=True))
    ]


def _apart(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the relative L2 distance and the cosine of each row."""
    relative = (one - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-30)
    return relative, torch.nn.functional.cosine_similarity(one, other, dim=1)


def short(value: float | None) -> float | None:
    """Returns a number with six digits."""
    return None if value is None else float(f"{value:.6g}")
