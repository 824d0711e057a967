"""Several files read and hashed at a time, by threads that stop together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from diffkiln.bundle.digest import Progress

_READERS = min(8, os.cpu_count() or 1)

#: Reads or hashes something, and calls its argument with the number of bytes since the last call.
Job = Callable[[Progress], None]


class Readers:
    """A pool of threads that run jobs.

    Args:
        progress: called with the bytes since its last call, from one thread at a time.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self, jobs: Iterable[Job]) -> None:
        """Runs all jobs. The first failure, Ctrl-C or `stop` ends the others at their next step."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="diffkiln-read") as pool:
            try:
                futures = [pool.submit(job, self.step) for job in jobs]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def step(self, count: int) -> None:
        """Counts bytes; ends the thread if it is to stop."""
        if self._stop.is_set():
            raise Stopped
        if self._progress is not None:
            with self._lock:
                self._progress(count)

    def stop(self) -> None:
        self._stop.set()


class Stopped(Exception):
    """The end of a job because another thread has failed, or nobody waits for this one any more."""
