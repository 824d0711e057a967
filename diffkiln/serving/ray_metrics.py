"""The numbers of fronts and replicas, as Ray exports them: of every process, at the metrics port of its machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.serve import metrics as ray

from diffkiln.serving.metrics import BATCHES, SECONDS, TEXTS, Metrics


def _by(*names: str) -> Any:
    """Returns the names of tags; Ray's annotation has a tuple of one."""
    return names


class RayMetrics(Metrics):
    """The numbers of one application, told to Ray as well.

    Ray names them as `/metrics` does, with `ray_` before, and adds the deployment, the replica and the application.

    Args:
        bundle: Name of the bundle that they are about; empty for those of a front.
    """

    def __init__(self, bundle: str = "") -> None:
        super().__init__()
        self._bundle = bundle
        self._read: dict[str, tuple[ray.Gauge, Callable[[], float]]] = {}
        self._answers = ray.Counter("diffkiln_requests", TEXTS["requests"], _by("route", "status"))
        self._calls = ray.Histogram("diffkiln_batch_images", TEXTS["batch"], _bounds(BATCHES), ("bundle",))
        self._left = ray.Counter("diffkiln_calls_abandoned", TEXTS["abandoned"], ("bundle",))
        self._times = ray.Histogram("diffkiln_phase_seconds", TEXTS["phase"], _bounds(SECONDS), _by("phase", "bundle"))

    def answered(self, route: str, status: int) -> None:
        super().answered(route, status)
        self._answers.inc(1, {"route": route, "status": str(status)})

    def called(self, rows: int) -> None:
        super().called(rows)
        self._calls.observe(rows, self._tags)

    def abandoned(self) -> None:
        super().abandoned()
        self._left.inc(1, self._tags)

    def phase(self, name: str, seconds: float) -> None:
        super().phase(name, seconds)
        self._times.observe(max(seconds, 0.0), {"phase": name, **self._tags})

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        super().gauge(name, text, read)
        self._read[name] = ray.Gauge(f"diffkiln_{name}", text, ("bundle",)), read

    def sample(self) -> None:
        """Tells Ray the numbers that change by themselves. Called again and again."""
        for gauge, read in self._read.values():
            gauge.set(read(), self._tags)

    @property
    def _tags(self) -> dict[str, str]:
        return {"bundle": self._bundle}


def _bounds(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]
