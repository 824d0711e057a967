"""Weights on their way into memory while the rest of a load goes on, and their hashes with them."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from diffkiln.bundle import GroupEntry, Progress, Readers, Verified
from diffkiln.errors import DiffkilnError
from diffkiln.program.streaming import Arena
from diffkiln.runtime.weights import WeightStore


class Arrival:
    """A context manager that reads and hashes weights in threads, from the moment it is made.

    When it ends, every file has been hashed, or `DigestMismatch` is raised. If something else fails meanwhile, the
    weights are still waited for, since a wrong digest is the better reason. Ctrl-C stops them.

    Args:
        verified: the bundle.
        device: where weights are used. Resident weights of a CPU are read here, and others hashed alone.
        offload: the spec's offload policy as JSON, or None.
        progress: called with the number of bytes hashed or read since its last call.
        share: whether resident weights of a CPU are shared with other processes.
        groups: the weights that this process needs, as the manifest lists them; by default all.
    """

    def __init__(
        self,
        verified: Verified,
        device: torch.device,
        offload: Mapping[str, Any] | None,
        progress: Progress | None,
        share: bool = False,
        groups: Mapping[str, Sequence[GroupEntry]] | None = None,
    ) -> None:
        self._verified, self._device, self._offload, self._share = verified, device, offload, share
        self._groups = verified.manifest.weights if groups is None else groups
        self._readers = Readers(progress)
        self._pool = ThreadPoolExecutor(1, "diffkiln-arrival")
        # In the load's own context, which holds its limits.
        context = contextvars.copy_context()
        self._resident: Future[WeightStore | None] = self._pool.submit(context.run, self._bring)

    def store(self, offload: Mapping[str, Any] | None, arena: Arena | None = None) -> WeightStore:
        """Returns the weight store; call it after the context manager has ended.

        Args:
            offload: the policy that was decided on meanwhile.
            arena: the slots of weights that stream.
        """
        resident = self._resident.result()
        groups = self._groups
        return resident or WeightStore(self._verified, groups, self._device, offload, share=self._share, arena=arena)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, DiffkilnError):
            self._readers.stop()
        try:
            self._pool.shutdown(wait=True)
        except BaseException:
            self._readers.stop()
            raise
        error = self._resident.exception()
        if error is not None and (kind is None or isinstance(error, DiffkilnError)):
            raise error

    def _bring(self) -> WeightStore | None:
        resident = None
        if self._offload is None and self._device.type == "cpu":
            groups = self._groups
            readers, share = self._readers, self._share
            resident = WeightStore(self._verified, groups, self._device, None, readers=readers, share=share)
        self._verified.hash_rest(self._readers)
        return resident
