"""Jobs in threads: all of them, or the first failure."""

from __future__ import annotations

import threading

import pytest

from diffkiln.bundle import Progress, Readers
from diffkiln.bundle.readers import Stopped

PIECE = 5


def job(step: Progress) -> None:
    for _ in range(3):
        step(PIECE)


def test_every_job_runs_and_progress_comes_from_one_thread_at_a_time() -> None:
    inside = threading.Lock()
    counts: list[int] = []

    def progress(count: int) -> None:
        assert inside.acquire(blocking=False)
        counts.append(count)
        inside.release()

    Readers(progress).run([job] * 20)
    assert sum(counts) == 20 * 3 * PIECE


def test_the_first_failure_is_raised_and_stops_the_others() -> None:
    ended = threading.Event()

    def endless(step: Progress) -> None:
        try:
            while True:
                step(1)
        except Stopped:
            ended.set()
            raise

    def fails(step: Progress) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Readers().run([endless, fails])
    assert ended.is_set()


def test_jobs_end_at_their_next_step_once_they_are_told_to_stop() -> None:
    readers = Readers()
    readers.stop()
    with pytest.raises(Stopped):
        readers.run([job])
