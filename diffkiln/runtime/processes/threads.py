"""A group whose processes are threads of one: how a bundle for several processes is tried before it is published."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from diffkiln.errors import PeerLost
from diffkiln.program import Mesh
from diffkiln.program.mesh import AXES
from diffkiln.runtime.processes.group import Group

_T = TypeVar("_T")


class Meeting:
    """The point where threads meet: each brings something, and takes what all have brought."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)
        self._brought: list[Any] = [None] * count

    def meet(self, index: int, brought: Any) -> list[Any]:
        """Returns what all have brought.

        Raises:
            PeerLost: another thread failed.
        """
        self._brought[index] = brought
        try:
            self._barrier.wait()
            found = list(self._brought)
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerLost("another of the processes that run this call together failed") from None
        return found

    def abort(self) -> None:
        """Ends the wait of all threads, now and later."""
        self._barrier.abort()


class Threaded(Group):
    """One of several threads that run a call together."""

    def __init__(self, mesh: Mesh, rank: int, meetings: dict[tuple[int, ...], Meeting]) -> None:
        super().__init__(mesh, rank)
        self._meetings = meetings

    def _meet(self, ranks: tuple[int, ...], brought: Any) -> list[Any]:
        return self._meetings[ranks].meet(ranks.index(self.rank), brought)

    def _gather(self, tensor: torch.Tensor, axis: str) -> list[torch.Tensor]:
        return self._meet(self.mesh.peers(self.rank, axis), tensor)

    def _exchange(self, parts: list[torch.Tensor], axis: str) -> list[torch.Tensor]:
        own = self.index(axis)
        return [given[own] for given in self._meet(self.mesh.peers(self.rank, axis), parts)]

    def _by_one(self, tensors: list[torch.Tensor], axis: str, index: int) -> list[torch.Tensor]:
        return self._meet(self.mesh.peers(self.rank, axis), tensors)[index]

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the first thread's tensor."""
        return self._meet(tuple(range(self.mesh.size)), tensor)[0]

    def everyones(self, digest: bytes) -> list[bytes]:
        """Returns the digest of each thread."""
        return self._meet(tuple(range(self.mesh.size)), digest)


def in_threads(mesh: Mesh, run: Callable[[Group], _T]) -> list[_T]:
    """Returns what a function gives for each process of a mesh, run side by side in threads.

    Raises:
        Exception: what the function raises; that of the lowest rank that was not merely left alone by another.
    """
    ranks = range(mesh.size)
    sets = {tuple(ranks)} | {mesh.peers(rank, axis) for rank in ranks for axis in AXES}
    meetings = {each: Meeting(len(each)) for each in sets}

    def one(rank: int) -> _T:
        try:
            return run(Threaded(mesh, rank, meetings))
        except BaseException:
            for meeting in meetings.values():
                meeting.abort()
            raise

    with ThreadPoolExecutor(mesh.size, "diffkiln-process") as pool:
        futures = [pool.submit(one, rank) for rank in ranks]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, PeerLost)):
        raise error
    return [future.result() for future in futures]
