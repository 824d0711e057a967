"""Memory of this process as the kernel tells it, and what the C library keeps of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_PROCESS = Path("/proc/self")


def highest() -> int:
    """Returns the most memory that this process has had, in bytes.

    The number that getrusage gives would count the parent's memory before `exec`, too.
    """
    return _status("VmHWM")


def present() -> int:
    """Returns the memory that this process has now, in bytes."""
    return _status("VmRSS")


def forget_highest() -> None:
    """Begins to look anew for the most memory. Source: proc_pid_clear_refs(5), "reset the peak resident set size"."""
    (_PROCESS / "clear_refs").write_text("5")


def return_memory() -> None:
    """Returns free memory to the system. The C library keeps the memory of freed tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024
