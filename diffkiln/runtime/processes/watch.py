"""The watch over the processes that run a call together: the system says at once which of them ends.

Every process has a descriptor of each other one (`pidfd_open`), which the kernel marks when that process ends, however
it ends. A process that goes on living, but cannot go on with the call, says so in the store.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

from diffkiln.errors import Incompatible, PeerLost
from diffkiln.program import Mesh
from diffkiln.program.mesh import AXES

#: Milliseconds between two looks at the store.
_PAUSE = 250
_FAILED = "failed"
_BOOT = "/proc/sys/kernel/random/boot_id"


class Watch:
    """A thread that waits for the end of other processes.

    Args:
        mesh: of all processes.
        rank: of this one.
        store: shared by all.

    Raises:
        Incompatible: a process is on another machine, or in another container, and so cannot be watched.
    """

    def __init__(self, mesh: Mesh, rank: int, store: Store) -> None:
        self._mesh, self._rank, self._store = mesh, rank, store
        self._lost, self._lingered = "", False
        self._closed = threading.Event()
        self._peers = dict(self._opened())
        self._thread = threading.Thread(target=self._run, name="diffkiln-watch", daemon=True)
        self._thread.start()

    def _opened(self) -> Iterator[tuple[int, int]]:
        """Yields the descriptor of each other process, with its rank."""
        own = _machine()
        self._store.set(f"process/{self._rank}", f"{os.getpid()} {own}")
        for rank in range(self._mesh.size):
            pid, _, machine = self._store.get(f"process/{rank}").decode().partition(" ")
            if machine != own:
                raise Incompatible(
                    f"process {rank} is on another machine or in another container than process {self._rank}, and "
                    f"the {self._mesh.size} processes of a call belong on one. Start all of them there"
                )
            if rank != self._rank:
                yield os.pidfd_open(int(pid)), rank

    @property
    def is_lost(self) -> bool:
        """Returns True if the call cannot go on."""
        return bool(self._lost)

    def check(self) -> None:
        """Raises `PeerLost` if another process ended or failed."""
        if self._lost:
            self._linger()
            raise PeerLost(self._lost)

    def _linger(self) -> None:
        """Waits until the others have looked at the store, which ends with the first process."""
        if self._rank == 0 and not self._lingered:
            self._lingered = True
            time.sleep(3 * _PAUSE / 1000)

    def reason_of(self, error: Exception, patience: float) -> PeerLost:
        """Returns the reason of a broken exchange: the process that ended, once the system has said which."""
        ends = time.monotonic() + patience
        while not self._lost and time.monotonic() < ends:
            time.sleep(0.01)
        self._linger()
        first = str(error).partition("\n")[0][:160]
        return PeerLost(self._lost or f"the connection to another of {self._mesh.size} processes broke: {first}")

    def fail(self, reason: str) -> None:
        """Says to all that this process cannot go on."""
        self._first(f"{name_of(self._mesh, self._rank)} failed: {reason[:300]}. Start all processes anew")
        self._lost = self._lost or f"this process failed in an earlier call ({reason}). Start all processes anew"

    def _first(self, reason: str) -> str:
        """Returns what was said first of why the processes cannot go on, which may be this reason.

        Processes that end because another one did are no reason: all say the first.
        """
        # Where the process with the store is gone, the others see that for themselves.
        with contextlib.suppress(RuntimeError):
            return self._store.compare_set(_FAILED, "", reason).decode()
        return reason

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join(5)

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in self._peers:
            poll.register(descriptor, select.POLLIN)
        while not self._closed.is_set() and not self._lost:
            ended = poll.poll(_PAUSE)
            if ended and not self._closed.is_set():
                name = name_of(self._mesh, self._peers[ended[0][0]])
                many = self._mesh.size
                self._lost = self._first(f"{name} ended while {many} processes ran together. Start all of them anew")
            else:
                self._lost = self._lost or self._said()
        for descriptor in self._peers:
            os.close(descriptor)

    def _said(self) -> str:
        """Returns why another process cannot go on; nothing if all can."""
        # Where the process with the store has ended, the next look shows it.
        with contextlib.suppress(RuntimeError):
            return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""
        return ""


def name_of(mesh: Mesh, rank: int) -> str:
    """Returns a process's name for a person: its rank, and what it is along each axis."""
    along = [f"{axis} {mesh.index(rank, axis)}" for axis in AXES if mesh.count(axis) > 1]
    return f"process {rank} ({', '.join(along)})"


def _machine() -> str:
    """Returns what processes have in common that see each other: the running kernel, and the names of processes."""
    with open(_BOOT, encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
