"""What a forked child must make anew: locks that threads of its parent held, those threads, and OpenMP's.

A server such as gunicorn with `preload` loads a pipeline, perhaps calls it, and forks. Of the parent's threads only the
one that forks is in the child, so whatever waits for another would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

#: Lets OpenMP's threads go (omp_pause_resource_t, OpenMP 5.0).
_HARD = 2


class Renewable(Protocol):
    """An owner of locks or threads."""

    def renew(self) -> None:
        """Makes the resources anew in a forked child, before anything else runs there."""
        ...


_known: weakref.WeakSet[Any] = weakref.WeakSet()
#: Called in a child that OpenMP was not made ready for; set by `keep_openmp`.
_without_openmp: list[Callable[[], object]] = []
_paused = False


def renewed(owner: Renewable) -> None:
    """Registers the owner: `owner.renew()` is called in every forked child as long as the owner lives."""
    _known.add(owner)


def keep_openmp(single: Callable[[], object]) -> None:
    """Makes forked children compute with OpenMP. `single` is called where that is impossible and sets one thread.

    GNU's OpenMP waits in a child for the parent's threads. If it lets them go before the fork, both start new ones when
    they next need them.
    """
    _without_openmp[:] = [single]


class Lock:
    """A lock that is open in a forked child, whoever held it in the parent. For `with` alone.

    Args:
        make: `threading.Lock` or `threading.RLock`.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make = make
        self._inner = make()
        self._held: list[Any] = []
        renewed(self)

    def __enter__(self) -> None:
        inner = self._inner
        inner.acquire()
        self._held.append(inner)

    def __exit__(self, *_: object) -> None:
        self._held.pop().release()  # the one that was taken, also where a fork came between

    def renew(self) -> None:
        self._inner = self._make()


def _before() -> None:
    global _paused
    _paused = bool(_without_openmp) and _let_threads_go()


def _in_child() -> None:
    for owner in list(_known):
        owner.renew()
    if not _paused:
        for single in _without_openmp:
            single()


def _let_threads_go() -> bool:
    """Returns True if every OpenMP in this process is known to work in a child."""
    return all(map(_paused_by, _openmps()))


def _openmps() -> set[str]:
    """Returns the files of the OpenMP libraries in this process; Intel's and LLVM's handle forks themselves."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            files = {line.split(maxsplit=5)[-1].strip() for line in maps if "gomp" in line}
    except OSError:
        return {""}
    return {file for file in files if os.path.basename(file).startswith("libgomp")}


def _paused_by(file: str) -> bool:
    try:
        return ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all(_HARD) == 0
    except (OSError, AttributeError):  # gone, or older than OpenMP 5.0
        return False


os.register_at_fork(before=_before, after_in_child=_in_child)
