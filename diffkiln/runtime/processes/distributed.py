"""A group over torch.distributed: NCCL between GPUs, gloo between CPUs, started by torchrun or `diffkiln run`.

Tensors travel as bytes, so that every dtype does. Nothing is summed on the way, so that the processes compute what one
would.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from diffkiln.errors import Incompatible
from diffkiln.program import Mesh
from diffkiln.program.mesh import AXES
from diffkiln.runtime.processes.group import Group
from diffkiln.runtime.processes.started import number_of
from diffkiln.runtime.processes.watch import Watch

#: A server may wait for the next request for as long as it likes: lives are watched, not times.
_FOR_EVER = datetime.timedelta(days=365)
#: How long a process looks for the others when it starts.
_START = datetime.timedelta(seconds=120)
#: Seconds between two looks at an exchange that has not ended, at first and at most.
_SHORTEST, _LONGEST = 20e-6, 1e-3
#: Seconds in which the system says which process ended, after a connection to it broke.
_PATIENCE = 5.0


class Distributed(Group):
    """One of several processes on one machine.

    Args:
        mesh: of all of them, whose size is the number that was started.
        device: where this process runs.

    Raises:
        Incompatible: the others did not come, or are on another machine.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        super().__init__(mesh, number_of("RANK"))
        self._device = device
        self._pending: Any = None
        self._own = not dist.is_initialized()
        try:
            self._store = _joined(device) if self._own else _store_of_default()
            self._groups = self._made_groups()
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise Incompatible(
                f"process {self.rank} of {mesh.size} could not join the others: {reason}. Start all {mesh.size} anew"
            ) from error
        self._watch = Watch(mesh, self.rank, self._store)

    def _made_groups(self) -> Mapping[str, Any]:
        """Returns the processes along each axis; every process makes the groups of all, in one order."""
        own: dict[str, Any] = {}
        for axis in AXES:
            sets: dict[tuple[int, ...], None] = dict.fromkeys(
                self.mesh.peers(rank, axis) for rank in range(self.mesh.size)
            )
            made: dict[tuple[int, ...], Any] = {
                ranks: dist.new_group(list(ranks), timeout=_FOR_EVER) for ranks in sets if len(ranks) > 1
            }
            if (ranks := self.mesh.peers(self.rank, axis)) in made:
                own[axis] = made[ranks]
        return own

    def _gather(self, tensor: torch.Tensor, axis: str) -> list[torch.Tensor]:
        data = _bytes(tensor)
        found = [torch.empty_like(data) for _ in range(self.mesh.count(axis))]
        self._wait(lambda: dist.all_gather(found, data, group=self._groups[axis], async_op=True))
        return [_typed(item, tensor) for item in found]

    def _exchange(self, parts: list[torch.Tensor], axis: str) -> list[torch.Tensor]:
        data = torch.stack(list(map(_bytes, parts)))
        found = torch.empty_like(data)
        self._wait(lambda: dist.all_to_all_single(found, data, group=self._groups[axis], async_op=True))
        return [_typed(item, parts[0]) for item in found]

    def _by_one(self, tensors: list[torch.Tensor], axis: str, index: int) -> list[torch.Tensor]:
        flat = list(map(_bytes, tensors))
        data, source = torch.cat(flat), self.mesh.peers(self.rank, axis)[index]
        self._wait(lambda: dist.broadcast(data, source, group=self._groups[axis], async_op=True))
        # Copies, since a type's values begin at a multiple of their size.
        parts = (part.clone() for part in data.split([len(each) for each in flat]))
        return [_typed(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of the process of rank 0."""
        data = _bytes(tensor.contiguous()).clone()
        self._wait(lambda: dist.broadcast(data, 0, async_op=True))
        return _typed(data, tensor)

    def everyones(self, digest: bytes) -> list[bytes]:
        """Returns the digest of each process, by rank."""
        data = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(self._device)
        found = [torch.empty_like(data) for _ in range(self.mesh.size)]
        self._wait(lambda: dist.all_gather(found, data, async_op=True))
        self.settle()
        return [bytes(item.cpu().numpy()) for item in found]

    # -- waiting --

    def _wait(self, begin: Any) -> None:
        """Begins an exchange, and waits for its end; on a GPU the stream waits, and `settle` later the host."""
        self._watch.check()
        try:
            self._pending = begin()
            if self._device.type == "cuda":
                self._pending.wait()
            else:
                self.settle()
        except (RuntimeError, ValueError) as error:
            raise self._watch.reason_of(error, _PATIENCE) from error

    def settle(self) -> None:
        """Waits for the last exchange that was begun, as long as all processes live."""
        work, self._pending = self._pending, None
        if work is None:
            return
        pause = _SHORTEST
        while not work.is_completed():
            self._watch.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        try:
            work.wait()
        except (RuntimeError, ValueError) as error:
            raise self._watch.reason_of(error, _PATIENCE) from error

    def fail(self, reason: str) -> None:
        """Has the other processes end their call, too: they read the reason in the store."""
        self._watch.fail(reason)

    def close(self) -> None:
        """Leaves the group; what was started elsewhere stays."""
        self._watch.close()
        if self._own and dist.is_initialized() and not self._watch.is_lost:
            dist.destroy_process_group()


def _joined(device: torch.device) -> Store:
    """Begins the default group of torch.distributed, and returns the store through which its processes found each
    other."""
    store, rank, size = next(iter(rendezvous("env://", timeout=_START)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    shared = PrefixStore("diffkiln", store)
    dist.init_process_group(backend, store=PrefixStore("group", shared), rank=rank, world_size=size)
    return PrefixStore("watch", shared)


def _store_of_default() -> Store:
    """Returns a store of the processes of a group that the caller's own code has begun."""
    store, _, _ = next(iter(rendezvous("env://", timeout=_START)))
    return PrefixStore("diffkiln/watch", store)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _typed(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return data.view(like.dtype).view(like.shape)
