"""A process that is killed at a step of its work: just before its n-th change of the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from diffkiln.bundle import rename

#: The system calls that change names; what else a test counts, it adds.
NAMES = ("mkdir", "rename", "rmdir", "unlink")


def killed_before(
    step: int, calls: Sequence[str], work: Callable[[], object], at_rename: Callable[[int], Any] | None = None
) -> int:
    """Do the work in a child, which is killed just before its n-th call, and give how it ended, as `waitpid` does.

    Args:
        step: n, from 0.
        calls: functions of `os` that count, beside the renaming that exchanges.
        at_rename: called with the number of calls so far where an exchange is due.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = [step]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    exchange = rename._renameat2

    def exchanging(*args: Any) -> Any:
        if at_rename is not None:
            at_rename(step - left[0])
        return exchange(*args)

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    rename._renameat2 = counted(exchanging)
    work()
    os._exit(0)
