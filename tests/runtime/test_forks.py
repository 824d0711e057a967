"""Pipelines in forked children, as a server has them that loads before it forks: children call, and draw the same."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkiln.errors import CallError
from diffkiln.guards import forks
from diffkiln.runtime.executor import Executor
from tests.forking import served


@pytest.mark.parametrize("when", ["loaded", "called", "calling"])
def test_children_of_a_server_draw_what_their_parent_draws(digits_bundle: Path, when: str) -> None:
    """Compiled, and offloaded in groups that a thread brings in."""
    rows = served(digits_bundle, when)
    assert len({row[0] for row in rows}) == 3
    assert len({digest for row in rows for digest in row[1:3]}) == 1


def test_children_keep_the_threads_that_were_asked_for(digits_bundle: Path) -> None:
    assert {row[3] for row in served(digits_bundle, "called")} == {"2"}


def in_child(work: Any) -> int:
    """How a forked child ends that works for at most a minute; 0 where the work gives True."""
    import signal

    if (child := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def held_by_a_thread(take: Any) -> tuple[threading.Event, threading.Thread]:
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with take:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    return done, thread


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_lock_that_a_thread_of_the_parent_holds_is_open_in_the_child(make: Any) -> None:
    lock = forks.Lock(make)

    def work() -> bool:
        with lock:
            return True

    done, thread = held_by_a_thread(lock)
    try:
        assert in_child(work) == 0
    finally:
        done.set()
        thread.join()


def test_lock_that_was_held_across_a_fork_is_given_back_in_both() -> None:
    lock = forks.Lock()

    def again() -> bool:
        with lock:
            return True

    with lock:
        child = os.fork()
    if child == 0:
        os._exit(0 if again() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert again()


def test_what_is_gone_is_not_renewed() -> None:
    class Owner:
        def renew(self) -> None:
            raise AssertionError

    owner: Any = Owner()
    forks.renewed(owner)
    del owner
    assert in_child(lambda: True) == 0


def test_child_computes_with_one_thread_where_openmp_cannot_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.randn(600, 600) @ torch.randn(600, 600)
    forks.keep_openmp(lambda: torch.set_num_threads(1))
    monkeypatch.setattr(forks, "_openmps", lambda: {"/nowhere/libgomp.so.1"})

    def work() -> bool:
        return bool((torch.ones(600, 600) @ torch.ones(600, 600)).sum()) and torch.get_num_threads() == 1

    assert in_child(work) == 0


def test_pipeline_on_a_gpu_says_that_it_was_loaded_before_the_fork() -> None:
    executor = Executor({}, _Nothing(), {}, {}, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    executor.device = torch.device("cuda")

    def work() -> bool:
        with pytest.raises(CallError, match="Load it in the child"), executor.running([]):
            pass
        return True

    assert in_child(work) == 0


class _Nothing:
    def follow(self, schedule: Any) -> Any:
        raise AssertionError
