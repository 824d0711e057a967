"""Reading weights: several threads read a file at once, and a GPU gets it through two buffers that take turns."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from diffkiln.runtime.accelerator import Accelerator, Event
from diffkiln.runtime.transfers import Layout

#: A fast disk is read at full speed by several requests at a time only.
READERS = min(8, max(4, os.cpu_count() or 4))
#: What one request reads at least: smaller ones cost more than they gain.
PIECE = 8 * 2**20
#: Bytes of each of the two buffers.
BUFFER = 64 * 2**20

#: Fills a buffer with a file's bytes from an offset on.
ReadInto = Callable[[str, memoryview, int], None]


class Reader:
    """A reader of pieces of files into host memory, several at a time."""

    def __init__(self, read_into: ReadInto, threads: int = READERS, piece: int = PIECE) -> None:
        self._read_into, self._threads, self._piece = read_into, threads, piece
        self._pool: ThreadPoolExecutor | None = None

    def fill(self, file: str, buffer: torch.Tensor, offset: int) -> torch.Tensor:
        """Fills a buffer of bytes with a file's from an offset on; gives the buffer.

        Raises:
            DigestMismatch: the file ends early, or was written to since it was hashed.
        """
        size = buffer.numel()
        view = memoryview(buffer.numpy().data) if size else memoryview(b"")
        step = max(self._piece, -(-size // self._threads))
        if size <= step:
            if size:
                self._read_into(file, view, offset)
            return buffer
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "diffkiln-read")
        pieces = [(view[at : at + step], offset + at) for at in range(0, size, step)]
        for done in [self._pool.submit(self._read_into, file, part, start) for part, start in pieces]:
            done.result()
        return buffer

    def close(self) -> None:
        """Ends the threads; the next large piece starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class Staging:
    """Two pinned buffers: one is read into while the GPU copies the other."""

    def __init__(self, accelerator: Accelerator, reader: Reader, size: int = BUFFER) -> None:
        self._accelerator, self._reader, self._size = accelerator, reader, size
        self._buffers: list[torch.Tensor] = []
        self._copied: list[Event | None] = [None, None]
        self._next = 0

    def bring(self, file: str, offset: int, nbytes: int, layout: Layout, flat: torch.Tensor) -> None:
        """Copies a file's data to the device in the current stream.

        Args:
            file: to be read.
            offset: where its data begins.
            nbytes: of the data.
            layout: how the data lies on the device.
            flat: where it lies there once the current stream has got so far.
        """
        for start in range(0, nbytes, self._size):
            end = min(start + self._size, nbytes)
            buffer, turn = self._free()
            self._reader.fill(file, buffer[: end - start], offset + start)
            for source, to, size in layout.copies:
                first, last = max(source, start), min(source + size, end)
                if first < last:
                    into = to + first - source
                    self._accelerator.copy(flat[into : into + last - first], buffer[first - start : last - start])
            event = self._copied[turn] = self._accelerator.event()
            event.record(self._accelerator.current_stream())

    def close(self) -> None:
        """Lets go of the buffers, once nothing is copied from them any more."""
        for event in self._copied:
            if event is not None:
                event.synchronize()
        self._buffers, self._copied = [], [None, None]

    def _free(self) -> tuple[torch.Tensor, int]:
        """Returns the buffer whose turn it is, once the device has copied its content."""
        if not self._buffers:
            self._buffers = [self._accelerator.pinned(self._size) for _ in range(2)]
        turn, self._next = self._next, 1 - self._next
        if (event := self._copied[turn]) is not None:
            event.synchronize()
        return self._buffers[turn], turn
