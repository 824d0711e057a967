"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

#: Seconds: from a tiny model's step to a video's minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
#: What the numbers are.
TEXTS = {
    "requests": "Requests answered, by route and status.",
    "batch": "Prompts in a call of the pipeline.",
    "abandoned": "Calls ended at a step, as no client waited.",
    "phase": (
        "Seconds of a phase: queue, denoise (with the text), preview, decode, encode (a file), request (all of it), "
        "job (of a video)."
    ),
}


class Metrics:
    """The numbers of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("diffkiln_requests", TEXTS["requests"], ("route", "status"), registry=self.registry)
        self._batch = Histogram("diffkiln_batch_images", TEXTS["batch"], buckets=BATCHES, registry=self.registry)
        self._abandoned = Counter("diffkiln_calls_abandoned", TEXTS["abandoned"], registry=self.registry)
        self._phases = Histogram(
            "diffkiln_phase_seconds", TEXTS["phase"], ("phase",), buckets=SECONDS, registry=self.registry
        )

    def answered(self, route: str, status: int) -> None:
        """Counts an answer."""
        self._requests.labels(route, str(status)).inc()

    def called(self, rows: int) -> None:
        """Counts a call of the pipeline, for so many prompts."""
        self._batch.observe(rows)

    def abandoned(self) -> None:
        """Counts a call that ended since nobody waited for it."""
        self._abandoned.inc()

    def phase(self, name: str, seconds: float) -> None:
        """Notes how long a phase took."""
        self._phases.labels(name).observe(max(seconds, 0.0))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a number that is read when it is asked for."""
        Gauge(f"diffkiln_{name}", text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Returns all numbers in Prometheus' text format."""
        return generate_latest(self.registry)
