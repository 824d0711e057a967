"""The one thread that owns the pipeline: it loads it, runs calls of one or several orders, and closes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from diffkiln.errors import DiffkilnError, OutOfMemory, PeerLost
from diffkiln.guards.gate import ours
from diffkiln.guards.printable import get_logger
from diffkiln.serving.loras import Loras
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.orders import Failed, Job, Made, Progress, Row, Shown
from diffkiln.serving.waiting import Queue

log = get_logger(__name__)


class Abandoned(Exception):
    """Raised within a call, at a step, when nobody waits for any of its images."""


class Worker:
    """Runs what the queue gives, one call after the other.

    Args:
        load: Gives the pipeline; called in the thread.
        queue: Where jobs wait.
        metrics: Told of every call.
        loaded: Called in the thread when the pipeline is there, or with the error.
        loras: The adapters that orders may ask for.

    Attributes:
        pipe: The pipeline, once it is loaded.
        error: Why it could not be loaded.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        queue: Queue,
        metrics: Metrics,
        loaded: Callable[[DiffkilnError | None], None] = lambda _: None,
        loras: Loras | None = None,
    ) -> None:
        self._loras = loras
        self._load, self._queue, self._metrics, self._loaded = load, queue, metrics, loaded
        self.pipe: Any = None
        self.error: DiffkilnError | None = None
        self._thread = threading.Thread(target=self._live, name="diffkiln-pipeline", daemon=True)

    def start(self) -> None:
        """Begins to load."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.pipe is not None and self.alive

    def join(self, seconds: float) -> None:
        """Waits for what the queue still holds."""
        self._thread.join(seconds)

    def _live(self) -> None:
        try:
            pipe = self._load()
        except BaseException as error:  # the thread has nobody above it who would hear
            self.error = error if isinstance(error, DiffkilnError) else ours(error, "serve")
            self._loaded(self.error)
            return
        with pipe:
            self.pipe = pipe
            self._queue.slots = getattr(pipe, "adapter_slots", 0)
            self._loaded(None)
            try:
                self._serve()
            except PeerLost as error:  # each of its next calls would fail as well
                log.error("the pipeline has ended: %s", error)
            self.pipe = None

    def _serve(self) -> None:
        while rows := self._queue.take():
            started = time.monotonic()
            self._run(rows)
            self._queue.done(len(rows), time.monotonic() - started)

    def _run(self, rows: Sequence[Row]) -> None:
        try:
            self._call(rows)
        except Abandoned:
            self._metrics.abandoned()
        except Exception as error:
            if len(rows) > 1 and not isinstance(error, OutOfMemory | PeerLost):
                for row in rows:  # the fault of one is not that of the others
                    if not row.job.left:
                        self._run([row])
                return
            known = isinstance(error, DiffkilnError)
            log.log(30 if known else 40, "call failed: %s: %s", type(error).__name__, error, exc_info=not known)
            for row in rows:
                row.job.tell(Failed(error))
                row.job.leave()
            if isinstance(error, PeerLost):
                raise

    def _call(self, rows: Sequence[Row]) -> None:
        choice = rows[0].job.choice
        jobs = list(dict.fromkeys(row.job for row in rows))
        watch = _Watch(rows, jobs, may_end=not self.pipe.bundle.manifest.runtime.get("parallel"))
        for job in jobs:
            self._metrics.phase("queue", watch.started - job.since)
        given = _given(rows, choice.fits(len(rows)))
        if not self._silent:
            given["callback_on_step_end"] = watch
        if self._loras is not None:
            given["adapters"] = self._loras.ready(self.pipe, _mixes(rows, choice.fits(len(rows))))
        result = self.pipe(**choice.keywords, **given)
        self._metrics.called(len(rows))
        self._metrics.phase("denoise", watch.stepped - watch.started - watch.showing)
        self._metrics.phase("decode", time.monotonic() - watch.stepped)
        if watch.showing:
            self._metrics.phase("preview", watch.showing)
        for row, image, picture in _pictures(rows, result):
            row.job.tell(Made(row.start + image, row.seeds[image], picture))

    @property
    def _silent(self) -> bool:
        """Returns True if calls are one launch, which has no steps to tell of."""
        return self.pipe.bundle.manifest.runtime.get("cuda_graphs") == "program"


class _Watch:
    """Called at the end of each step of a call.

    Args:
        rows, jobs: Of the call.
        may_end: Whether the call may end early. One process of several cannot end it for the others.

    Attributes:
        started, stepped: When the call began, and when its last step ended, of the monotonic clock.
        showing: Seconds that previews took.
    """

    def __init__(self, rows: Sequence[Row], jobs: Sequence[Job], may_end: bool = True) -> None:
        self._rows, self._jobs, self._may_end = rows, jobs, may_end
        self._showing = {step for job in jobs for step in job.shown}
        self.started = self.stepped = time.monotonic()
        self.showing = 0.0

    def __call__(self, pipe: Any, step: int, _timestep: float, _values: Mapping[str, Any]) -> dict[str, Any]:
        self.stepped = time.monotonic()
        if self._may_end and all(job.left for job in self._jobs):
            raise Abandoned
        for job in self._jobs:
            if job.order.watched and not job.left:
                job.tell(Progress(step + 1, job.choice.steps))
        if step + 1 in self._showing:
            self._show(pipe, step + 1)
        return {}

    def _show(self, pipe: Any, step: int) -> None:
        """Makes the previews of a step, if anybody still waits for one."""
        if not any(step in job.shown and not job.left for job in self._jobs):
            return
        for row, image, picture in _pictures(self._rows, pipe.preview()):
            if step in row.job.shown:
                row.job.tell(Shown(row.start + image, row.seeds[image], row.job.shown[step], picture))
        self.showing += time.monotonic() - self.stepped


def _pictures(rows: Sequence[Row], result: Mapping[str, Any]) -> Iterator[tuple[Row, int, Any]]:
    """Yields the pictures of a call that are wanted, each with its row and its place among those of the row."""
    pictures = next(iter(result.values()))
    for number, row in enumerate(rows):
        for image in range(row.count):
            yield row, image, pictures[number * row.job.choice.images + image]


def _mixes(rows: Sequence[Row], batch: int) -> list[Mapping[str, float]]:
    """Returns the adapters of each row of a batch; one mix alone where all have the same."""
    found = [row.job.order.lora for row in _filled(rows, batch)]
    return found[:1] if all(mix == found[0] for mix in found) else found


def _filled(rows: Sequence[Row], batch: int) -> list[Row]:
    """Returns the rows of a batch, which is padded with its last row where it is not filled."""
    return [*rows, *[rows[-1]] * (batch - len(rows))]


def _given(rows: Sequence[Row], batch: int) -> dict[str, Any]:
    """Returns the keywords that differ from row to row."""
    filled = _filled(rows, batch)
    first = rows[0].job.order
    given: dict[str, Any] = {name: [row.job.order.prompts[name] for row in filled] for name in first.prompts}
    for name in first.images:
        given[name] = [image for row in filled for image in row.job.order.images[name]]
    given["generator"] = [torch.Generator("cpu").manual_seed(seed) for row in filled for seed in row.seeds]
    return given
