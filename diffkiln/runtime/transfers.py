"""The way of weights to a GPU: from pinned memory of the host, ahead of their use, and never far ahead.

A host launches far more than the GPU has computed. So three things are told by events, and not by what the host has
done: a group is there when its own copy has arrived; its memory is free when the GPU has used it for the last time; and
no group is brought in before those that left are gone, or a run that is launched in a moment would hold them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from diffkiln.runtime.accelerator import Accelerator, Event

#: Bytes that an address on a GPU is a multiple of, as torch's own allocations are. Inductor's kernels, cuDNN and
#: TensorRT copy what is not, in every call (GPU_ALIGN_BYTES in torch/_inductor/utils.py; NvInferRuntime.h).
ALIGNMENT = 256


class Stretch(Protocol):
    """The bytes [start, end) of a file's data."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """The layout of a file's tensors on a GPU: where each begins, copies as (from, to, bytes), and the size."""

    starts: Mapping[str, int]
    copies: tuple[tuple[int, int, int], ...]
    nbytes: int


def aligned(entries: Mapping[str, Stretch]) -> Layout:
    """Places each tensor at a multiple of `ALIGNMENT`, with as few copies as possible.

    Args:
        entries: by name, none overlapping another. They lie side by side, so one of three elements displaces all that
            follow.
    """
    starts: dict[str, int] = {}
    copies: list[tuple[int, int, int]] = []
    source = target = end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if (target + entry.start - source) % ALIGNMENT:
            if end > source:
                copies.append((source, target, end - source))
            target += -(-(end - source) // ALIGNMENT) * ALIGNMENT
            source = end = entry.start
        starts[name] = target + entry.start - source
        end = entry.end
    if end > source:
        copies.append((source, target, end - source))
    return Layout(starts, tuple(copies), target + end - source)


class TransferQueue:
    """A stream of its own, on which groups are copied while the GPU computes with others."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._stream = accelerator.stream()
        self._left: deque[Event] = deque()

    def bring(self, copy: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Event]:
        """Starts to copy weights, once all that left before is gone. May be called from another thread.

        Args:
            copy: launches the copies in the current stream; what it copies from must stay until they are done.

        Returns:
            What `copy` gives, and the event of its arrival.
        """
        while self._left:
            self._left.popleft().synchronize()
        arrived = self._accelerator.event()
        with self._accelerator.active(), self._accelerator.on(self._stream):
            flat = copy()
            arrived.record(self._stream)
        return flat, arrived

    def fill(self, copy: Callable[[], object], free: Iterable[Event]) -> Event:
        """Starts to copy weights to where others lay, once these were used for the last time; the host does not wait.

        Args:
            copy: as for `bring`.
            free: the events of their last uses.

        Returns:
            The event of the arrival.
        """
        arrived = self._accelerator.event()
        for event in free:
            self._stream.wait_event(event)
        with self._accelerator.active(), self._accelerator.on(self._stream):
            copy()
            arrived.record(self._stream)
        return arrived

    def follow(self) -> None:
        """Makes copies that start next wait for all that was launched in the current stream."""
        self._stream.wait_stream(self._accelerator.current_stream())

    def arrive(self) -> None:
        """Makes work launched next wait for all copies that were started."""
        self._accelerator.current_stream().wait_stream(self._stream)

    def wait(self, arrived: Event) -> None:
        """Makes work launched next wait for this arrival, and for no later one."""
        self._accelerator.current_stream().wait_event(arrived)

    def leaves(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keeps tensors' memory until work launched with them has run. The holder then drops them."""
        current = self._accelerator.current_stream()
        for tensor in tensors:
            self._accelerator.keep(tensor, current)

    def left(self) -> None:
        """Records that the tensors were dropped. From here on torch may reuse their memory once it is free."""
        gone = self._accelerator.event()
        gone.record(self._accelerator.current_stream())
        self._left.append(gone)

    def close(self) -> None:
        """Waits until nothing is copied any more."""
        self._stream.synchronize()
