"""Calls of several threads, one at a time: who waits, for how long, and what ends the wait."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from diffkiln.errors import Busy, CallError
from diffkiln.runtime.turns import Turns

SOON = 30.0


class Held:
    """A turn that another thread has until `release`."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._in, self._done = turns, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)
        self._thread.start()
        assert self._in.wait(SOON)

    def _hold(self) -> None:
        with self._turns.taken():
            self._in.set()
            self._done.wait(SOON)

    def release(self) -> None:
        self._done.set()
        self._thread.join(SOON)


@contextlib.contextmanager
def held(turns: Turns) -> Iterator[None]:
    other = Held(turns)
    try:
        yield
    finally:
        other.release()


def waiting(turns: Turns, work: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that runs `work` and waits in the line by now, and what it raises."""
    before, raised = len(turns._line), []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    end = time.monotonic() + SOON
    while len(turns._line) == before and time.monotonic() < end:
        time.sleep(0.001)
    return thread, raised


def test_calls_come_in_the_order_in_which_they_were_made() -> None:
    turns, order = Turns(), []

    def call(number: int) -> None:
        with turns.taken(SOON):
            order.append(number)

    with held(turns):
        threads = [waiting(turns, lambda number=number: call(number))[0] for number in range(5)]
    for thread in threads:
        thread.join(SOON)
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("timeout", [0, 0.0, 0.05])
def test_who_waits_longer_than_the_timeout_is_told_so(timeout: float) -> None:
    turns = Turns()
    with held(turns), pytest.raises(Busy, match="Try again later"), turns.taken(timeout):
        raise AssertionError
    with turns.taken(0):
        pass


def test_who_gave_up_is_not_waited_for() -> None:
    turns, done = Turns(), []

    def call() -> None:
        with turns.taken(None):
            done.append(True)

    with held(turns):
        with contextlib.suppress(Busy), turns.taken(0.01):
            raise AssertionError
        thread, _ = waiting(turns, call)
    thread.join(SOON)
    assert done


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e30, 3])
def test_a_wait_may_be_without_end(timeout: float | None) -> None:
    turns = Turns()
    with held(turns):
        thread, raised = waiting(turns, lambda: turns.taken(timeout).__enter__())
    thread.join(SOON)
    assert not raised


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True, [1]])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(CallError, match="timeout: give the seconds"), Turns().taken(timeout):
        raise AssertionError


def test_a_turn_within_its_own_is_refused_at_once() -> None:
    turns = Turns()
    with turns.taken(), pytest.raises(CallError, match="called within its own call"), turns.taken(None):
        raise AssertionError
    with turns.taken(0):
        pass


def test_an_exception_gives_the_turn_back() -> None:
    turns = Turns()
    for kind in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), turns.taken(0):
            raise kind
    assert turns.current is None


def test_close_ends_the_wait_of_others_and_waits_for_the_call_that_runs() -> None:
    turns = Turns()
    other = Held(turns)
    thread, raised = waiting(turns, lambda: turns.taken(None).__enter__())
    closing = threading.Thread(target=turns.close)
    closing.start()
    thread.join(SOON)
    assert isinstance(raised[0], CallError)
    assert "closed while the call waited" in str(raised[0])
    closing.join(0.05)
    assert closing.is_alive()
    other.release()
    closing.join(SOON)
    assert not closing.is_alive()
    with pytest.raises(CallError, match="Load the bundle again"), turns.taken():
        raise AssertionError


def test_close_is_busy_where_the_call_does_not_end_and_may_be_tried_again() -> None:
    turns = Turns()
    with held(turns), pytest.raises(Busy, match="close:"):
        turns.close(0.01)
    turns.close(0)
    turns.close()


def test_close_within_a_call_is_refused_at_once() -> None:
    turns = Turns()
    with turns.taken(), pytest.raises(CallError, match=r"Call interrupt\(\) there"):
        turns.close()
    turns.close()


def test_a_child_has_the_turn_that_its_own_thread_has_and_no_others() -> None:
    turns = Turns()
    with held(turns):
        if (child := os.fork()) == 0:
            signal.alarm(20)
            with turns.taken(0):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    with turns.taken():
        if (child := os.fork()) == 0:
            signal.alarm(20)
            try:
                with turns.taken(0):
                    pass
            except CallError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_ctrl_c_ends_a_wait_and_leaves_the_line_whole() -> None:
    code = """
import os, signal, threading, time
from diffkiln.runtime.turns import Turns
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
turns, inside, done = Turns(), threading.Event(), threading.Event()
def hold():
    with turns.taken():
        inside.set()
        done.wait(30)
thread = threading.Thread(target=hold)
thread.start()
inside.wait(30)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    with turns.taken(None):
        raise SystemExit(1)
except KeyboardInterrupt:
    print("interrupted")
done.set()
thread.join()
with turns.taken(0):
    print("whole")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["interrupted", "whole"], ran.stderr
