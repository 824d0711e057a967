"""A process's view of those that run a call with it: what it exchanges with them, and the bytes that it has sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from diffkiln.errors import CallError
from diffkiln.program import Mesh


class Group(ABC):
    """The processes of a mesh, seen from one of them.

    Args:
        mesh: the grid of processes.
        rank: of this process in it.

    Attributes:
        sent: bytes of tensors that this process has sent to others, noise and checks not counted.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.rank = mesh, rank
        self.sent = 0

    def index(self, axis: str) -> int:
        """Returns which process along an axis this one is, from 0."""
        return self.mesh.index(self.rank, axis)

    def gather(self, tensor: torch.Tensor, axis: str) -> list[torch.Tensor]:
        """Returns the tensors of all processes along an axis, in their order; all have one type.

        Raises:
            PeerLost: another process ended.
        """
        self.sent += tensor.numel() * tensor.itemsize * (self.mesh.count(axis) - 1)
        return self._gather(tensor.contiguous(), axis)

    def exchange(self, parts: Sequence[torch.Tensor], axis: str) -> list[torch.Tensor]:
        """Sends one tensor to each process along an axis, and returns those that they send; all have one type.

        Raises:
            PeerLost: another process ended.
        """
        own = self.index(axis)
        self.sent += sum(part.numel() * part.itemsize for index, part in enumerate(parts) if index != own)
        return self._exchange([part.contiguous() for part in parts], axis)

    def by_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the first process's tensor, as `from_first` does, and counts what that one sends."""
        if self.rank == 0:
            self.sent += tensor.numel() * tensor.itemsize * (self.mesh.size - 1)
        return self.from_first(tensor)

    def by_one(self, tensors: Sequence[torch.Tensor], axis: str, index: int) -> list[torch.Tensor]:
        """Returns the tensors of one process along an axis, which take the place of everyone's own of their types.

        Raises:
            PeerLost: another process ended.
        """
        if self.index(axis) == index:
            self.sent += sum(tensor.numel() * tensor.itemsize for tensor in tensors) * (self.mesh.count(axis) - 1)
        return self._by_one([tensor.contiguous() for tensor in tensors], axis, index)

    @abstractmethod
    def _gather(self, tensor: torch.Tensor, axis: str) -> list[torch.Tensor]: ...

    @abstractmethod
    def _exchange(self, parts: list[torch.Tensor], axis: str) -> list[torch.Tensor]: ...

    @abstractmethod
    def _by_one(self, tensors: list[torch.Tensor], axis: str, index: int) -> list[torch.Tensor]: ...

    @abstractmethod
    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the first process's tensor, which takes the place of everyone's own of its type.

        Raises:
            PeerLost: another process ended.
        """

    @abstractmethod
    def everyones(self, digest: bytes) -> list[bytes]:
        """Returns 32 bytes of each process, by rank.

        Raises:
            PeerLost: another process ended.
        """

    def agree(self, digest: bytes) -> None:
        """Checks that all processes were asked for the same.

        Args:
            digest: of what this process was asked for, 32 bytes.

        Raises:
            CallError: another process was asked for something else; says which.
            PeerLost: another process ended.
        """
        digests = self.everyones(digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise CallError(
                f"process {others[0]} of {self.mesh.size} was called with other arguments than process 0, and all "
                "run one call together. Give each the same prompt, images and keywords"
            )

    def settle(self) -> None:  # noqa: B027 (most have nothing to do)
        """Waits for exchanges that were begun, where they run beside the host. Raises `PeerLost` as they do."""

    def fail(self, reason: str) -> None:  # noqa: B027 (most have nothing to do)
        """Tells the other processes that this one cannot go on with the call that runs."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Leaves the group."""


class Pretended(Group):
    """A group of one process that takes its own tensors for everyone's: types are right, and values are not."""

    def _gather(self, tensor: torch.Tensor, axis: str) -> list[torch.Tensor]:
        return [tensor.clone() for _ in range(self.mesh.count(axis))]

    def _exchange(self, parts: list[torch.Tensor], axis: str) -> list[torch.Tensor]:
        return [part.clone() for part in parts]

    def _by_one(self, tensors: list[torch.Tensor], axis: str, index: int) -> list[torch.Tensor]:
        return tensors

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor."""
        return tensor

    def everyones(self, digest: bytes) -> list[bytes]:
        """Returns the digest for each process."""
        return [digest] * self.mesh.size
