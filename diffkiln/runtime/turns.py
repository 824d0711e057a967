"""Whose turn it is: a pipeline makes one call at a time, and calls of other threads wait in the order they came."""

from __future__ import annotations

import contextlib
import math
import numbers
import threading
import time
from collections.abc import Iterator
from typing import Any

from diffkiln.errors import Busy, CallError
from diffkiln.guards import forks

#: Seconds that a call waits for those before it, unless its caller says otherwise.
PATIENCE = 600.0


class Turn:
    """One call's place in the line. `interrupted` ends the call after the step that it is in."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.interrupted = False


class Turns:
    """The line of calls of one pipeline; the first in it is the one that runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[Turn] = []
        self._closing = False
        forks.renewed(self)

    @property
    def current(self) -> Turn | None:
        """Returns the call that runs now; None if none does."""
        line = self._line
        return line[0] if line else None

    @property
    def closed(self) -> bool:
        return self._closing

    @contextlib.contextmanager
    def taken(self, timeout: float | None = PATIENCE) -> Iterator[Turn]:
        """Waits for the calls before this one, and is this one's turn while the block lasts.

        Args:
            timeout: seconds to wait; None waits for ever, 0 not at all.

        Raises:
            Busy: others ran for longer than that.
            CallError: this thread is within a call already; or the pipeline is closed, also while this one waits.
        """
        seconds = patience(timeout)
        self.check()
        turn = Turn()
        try:
            # An exception from outside, such as Ctrl-C, finds the turn in the line or not: both are put right below.
            self._wait(turn, seconds)
            yield turn
        finally:
            self._leave(turn)

    def close(self, timeout: float | None = PATIENCE) -> None:
        """Refuses every call from now on, those that wait included, and waits for the one that runs.

        Raises:
            Busy: it ran for longer than `timeout` seconds.
            CallError: this thread is within a call.
        """
        seconds, mine = patience(timeout), threading.get_ident()
        if any(turn.thread == mine for turn in self._line):
            raise CallError(
                "close: this pipeline is within a call of the same thread, say in a callback. Call interrupt() there, "
                "and close() after the call"
            )
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._line, seconds):
                raise Busy(f"close: a call in another thread has not ended within {seconds:g} seconds. Try again later")

    def renew(self) -> None:
        """Begins anew in a forked child: calls of the parent's other threads go on there alone."""
        self._changed = threading.Condition()
        self._line = [turn for turn in self._line if turn.thread == threading.get_ident()]

    def check(self) -> None:
        """Raises `CallError` where no call of this thread can be made: after `close`, or within a call of its own."""
        if self._closing:
            raise CallError("this pipeline is closed. Load the bundle again to call it")
        if any(turn.thread == threading.get_ident() for turn in self._line):
            raise CallError("this pipeline is called within its own call, say by a callback. Load the bundle twice")

    def _wait(self, turn: Turn, seconds: float | None) -> None:
        start = time.monotonic()
        with self._changed:
            self._line.append(turn)
            in_time = self._changed.wait_for(lambda: self._closing or self._line[0] is turn, seconds)
            if self._closing:
                raise CallError("this pipeline was closed while the call waited for its turn. Load the bundle again")
        if not in_time:
            raise Busy(
                f"this pipeline has been busy with calls of other threads for {time.monotonic() - start:.3g} seconds. "
                "Try again later, wait longer (timeout=), or load the bundle once more"
            )

    def _leave(self, turn: Turn) -> None:
        with self._changed:
            if turn in self._line:
                self._line.remove(turn)
                self._changed.notify_all()


def patience(timeout: Any) -> float | None:
    """Returns seconds that a lock can wait; None where it is to wait for ever.

    Raises:
        CallError: it is no number, or below 0.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real) or math.isnan(timeout) or timeout < 0:
        raise CallError("timeout: give the seconds to wait for other calls, 0 or more, or None to wait for ever")
    seconds = float(timeout)
    return seconds if seconds < threading.TIMEOUT_MAX else None
