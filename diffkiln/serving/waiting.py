"""The queue: bounded, first come first served, and rows that may share a call leave it together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from diffkiln.serving.orders import Job, Row
from diffkiln.serving.refusals import Refusal

#: How much the time of the latest call counts in the estimate.
_WEIGHT = 0.2


class Queue:
    """Rows that wait for the pipeline.

    Args:
        capacity: Rows that wait at most.
        window: Seconds that a row waits for others of its kind.

    Attributes:
        slots: Adapters that rows of one call may use between them; without slots all have the same.
    """

    slots = 0

    def __init__(self, capacity: int, window: float) -> None:
        self._capacity, self._window = capacity, window
        self._rows: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running = 0
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def running(self) -> int:
        """Returns the rows that are in the pipeline."""
        return self._running

    def put(self, job: Job) -> None:
        """Adds the rows of a job.

        Raises:
            Refusal: there is no place for them (429), or the queue is closed (503).
        """
        rows = job.rows
        with self._changed:
            if self._closed:
                raise Refusal(503, "this server is shutting down. Send the request again, to another", retry_after=1)
            self._forget()
            self._check_room(len(rows))
            self._rows.extend(rows)
            self._changed.notify()

    def check(self) -> None:
        """Raises `Refusal` (429) if there is no place for even one more row."""
        if len(self._rows) < self._capacity:  # nearly always; no need to wait for whoever holds the lock
            return
        with self._changed:
            self._forget()
            self._check_room(1)

    def forget(self) -> None:
        """Frees the places of jobs that nobody waits for."""
        with self._changed:
            self._forget()

    def take(self) -> list[Row]:
        """Waits for rows, and returns those of the next call; none after the queue was closed and is empty."""
        with self._changed:
            while True:
                self._forget()
                if self._rows:
                    rest = self._patience()
                    if rest <= 0:
                        return self._next()
                    self._changed.wait(rest)
                elif self._closed:
                    return []
                else:
                    self._changed.wait()

    def done(self, rows: int, seconds: float) -> None:
        """Notes that a call of so many rows is over, and how long it took."""
        with self._changed:
            self._running = 0
            each = seconds / rows
            self._seconds += (each - self._seconds) * (_WEIGHT if self._seconds else 1.0)

    def close(self) -> None:
        """Takes no more jobs; those that wait are still run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _forget(self) -> None:
        if any(row.job.left for row in self._rows):
            self._rows = deque(row for row in self._rows if not row.job.left)

    def _check_room(self, rows: int) -> None:
        if len(self._rows) + rows > self._capacity:
            wait = self._wait()
            raise Refusal(429, f"{len(self._rows)} images wait already. Try again in {wait} s", retry_after=wait)

    def _wait(self) -> int:
        return max(1, math.ceil(self._seconds * (len(self._rows) + self._running)))

    def _alike(self) -> list[Row]:
        """Returns the rows that may share a call with the first one: of its kind, and whose adapters are its own, or
        fit into the slots together."""
        first = self._rows[0].job
        names = set(first.order.lora)
        found: list[Row] = []
        for row in (row for row in self._rows if row.job.kind == first.kind):
            if row.job.order.lora == first.order.lora or len(names | row.job.order.lora.keys()) <= self.slots:
                names |= row.job.order.lora.keys()
                found.append(row)
        return found

    def _patience(self) -> float:
        """Seconds for which the first row may still wait for others; none where enough are there."""
        first = self._rows[0].job
        if self._closed or len(self._alike()) >= first.choice.batches[-1]:
            return 0.0
        return first.since + self._window - time.monotonic()

    def _next(self) -> list[Row]:
        alike = self._alike()
        taken = alike[: self._rows[0].job.choice.fits(len(alike))]
        kept = set(map(id, taken))
        self._rows = deque(row for row in self._rows if id(row) not in kept)
        self._running = len(taken)
        return taken
