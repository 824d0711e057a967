"""The most that a device can do, for predictions of time: of a GPU as its data sheet says, of this CPU as measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from diffkiln.program.clocks import Link
from diffkiln.program.work import Ceilings
from diffkiln.runtime import accelerator
from diffkiln.spec import Target, find_gpu

#: Side of the matrices that arithmetic is measured with, and the bytes that are copied to measure memory.
_SIDE, _COPIED = 1536, 1 << 28
_TIMES = 3


def ceilings_of(target: Target) -> Ceilings:
    """Returns what a target can do at most; nothing is known of a CPU that is not here."""
    half = {16: target.half_flops} if target.half_flops else {}
    return Ceilings(half, target.memory_bandwidth, target.h2d_bandwidth)


def link_of(target: Target) -> Link | None:
    """Returns the link between several such GPUs of a machine; None for a CPU."""
    return Link(target.peer_bandwidth) if target.peer_bandwidth else None


def ceilings_here(device: torch.device, file: str | None = None) -> Ceilings:
    """Returns what this machine can do at most.

    Args:
        device: a GPU is looked up by its name, the CPU measured for about a second.
        file: one that weights come from, which a CPU reads them from again and again; None where they stay in memory.
    """
    if device.type == "cuda":
        name = accelerator.model(device).rpartition(" ")[0]
        target = find_gpu(name)
        return ceilings_of(target) if target else Ceilings()
    return Ceilings({32: _arithmetic()}, _memory(), _link(file) if file else None)


def _arithmetic() -> float:
    """Returns additions and multiplications a second of products of float32 matrices."""
    matrix = torch.ones(_SIDE, _SIDE)
    return 2 * _SIDE**3 / _best(lambda: torch.mm(matrix, matrix))


def _memory() -> float:
    """Returns the bytes a second that a copy reads and writes."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPIED / _best(lambda: target.copy_(source))


def _link(file: str) -> float:
    """Returns the bytes a second that one thread reads of a file which was read before."""
    buffer = memoryview(bytearray(_COPIED))

    def read() -> None:
        with open(file, "rb", buffering=0) as opened:
            sizes.append(opened.readinto(buffer) or 1)

    sizes: list[int] = []
    seconds = _best(read)
    return sizes[-1] / seconds


def _best(run: Callable[[], object]) -> float:
    """Returns the least seconds of several runs, after one that does not count."""
    run()
    found = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
