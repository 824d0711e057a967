"""The weight store: where weights are looked up at each call, and when they are in memory.

Weights lie in *groups*, one safetensors file each: the repeated blocks (or several of them) and the rest of a
component. Without offloading every group stays on the device. With it a group is brought in ahead of its use and leaves
after it: the program says exactly when, so the store follows a schedule instead of guessing.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffkiln.bundle import GroupEntry, Job, Readers, Verified
from diffkiln.errors import IntegrityError
from diffkiln.guards import forks
from diffkiln.interpreter.aten import dtype_name
from diffkiln.program import TensorType
from diffkiln.program.moments import Key
from diffkiln.program.residency import Residency
from diffkiln.program.streaming import Arena
from diffkiln.runtime.accelerator import Accelerator, accelerator
from diffkiln.runtime.groups import Group, keys_by_weight, read_groups
from diffkiln.runtime.staging import Reader, Staging
from diffkiln.runtime.streaming import Moves, SlotCursor, Slots
from diffkiln.runtime.transfers import ALIGNMENT, TransferQueue

#: What one reader takes at a time of a file that has been hashed.
_PIECE = 1 << 26


@dataclass(frozen=True)
class Patch:
    """A change of some weights of one group.

    Attributes:
        weights: their names.
        apply: changes them in place, given the group's tensors with the originals among them.
    """

    weights: tuple[str, ...]
    apply: Callable[[Mapping[str, torch.Tensor]], None]


class WeightStore:
    """The store that brings groups of weights to the device and counts those that are there.

    Args:
        verified: the bundle; weights are read through its held descriptors.
        groups: the manifest's table of weights.
        device: where weights are used.
        offload: the spec's offload policy as JSON, or None to keep everything on the device.
        on: stands for the device; None finds it.
        readers: read resident weights, several files at a time.
        share: whether resident weights in the host's memory are shared with other processes of this user.
        arena: the slots of weights that stream; None where they do not.

    Attributes:
        bytes_now, bytes_peak: weights on the device, in bytes.
        groups_now, groups_peak: the same in groups.
        brought, bytes_brought: how many times a group was brought in, and the bytes of all together.
    """

    def __init__(
        self,
        verified: Verified,
        groups: Mapping[str, Sequence[GroupEntry]],
        device: torch.device,
        offload: Mapping[str, Any] | None,
        on: Accelerator | None = None,
        readers: Readers | None = None,
        share: bool = False,
        arena: Arena | None = None,
    ) -> None:
        self.device, self.offload, self._share = device, offload, share
        self._verified = verified
        self._accelerator = on or accelerator(device)
        self._reader = Reader(lambda file, view, offset: verified.read_into(file, view, offset))
        self._staging = Staging(self._accelerator, self._reader) if self._accelerator else None
        self.groups = read_groups(verified, groups)
        self._of_weight = keys_by_weight(self.groups)
        self.bytes_now = self.bytes_peak = self.groups_now = self.groups_peak = self.brought = self.bytes_brought = 0
        self._counting = threading.Lock()
        self._here: dict[Key, Future[dict[str, torch.Tensor]]] = {}
        self._patches: Mapping[Key, Sequence[Patch]] = {}
        self._written: set[tuple[Key, str]] = set()
        self._fills: dict[Key, dict[Hashable, Patch]] = {}
        self._beside: dict[Key, dict[str, torch.Tensor]] = {}
        ahead = offload is not None and (arena is not None or offload.get("use_stream", True))
        self._worker = _worker() if ahead else None
        self._transfers = TransferQueue(self._accelerator) if ahead and self._accelerator else None
        self._slots = Slots(arena, self._accelerator) if arena is not None else None
        self._moves: Moves | None = None
        if self._slots is not None:
            self._open(self._slots)
        forks.renewed(self)
        if offload is None and device.type == "cpu":
            self._bring_all(readers or Readers())
        elif offload is None:
            for key in self.groups:
                self._here[key] = _done(self._bring(key))
            self._close_readers()
        elif self._accelerator and offload.get("to") != "disk":
            self._fill_host(self._accelerator)
            self._close_readers()

    def _open(self, slots: Slots) -> None:
        """Counts the memory of slots, which nothing is copied into that somebody else may still be using."""
        self.bytes_now = self.bytes_peak = slots.arena.nbytes
        if self._transfers is not None:
            self._transfers.follow()

    def key_of(self, component: str, weight: str) -> Key:
        """Returns the key of the group that holds a weight."""
        try:
            return self._of_weight[component, weight]
        except KeyError:
            raise IntegrityError(f"the bundle holds no weight {weight!r} of component {component!r}") from None

    def type_of(self, component: str, weight: str) -> TensorType | None:
        """Returns the type of a weight as the file has it; None if no file holds it."""
        key = self._of_weight.get((component, weight))
        if key is None:
            return None
        entry = self.groups[key].entries[weight]
        return TensorType(dtype_name(entry.dtype), entry.used_shape)

    def peek(self, component: str, weight: str) -> torch.Tensor:
        """Returns a copy of one weight on the device, read by itself."""
        group = self.groups[self.key_of(component, weight)]
        entry = group.entries[weight]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        self._verified.read_into(group.file, memoryview(raw.numpy().data), group.offset + entry.start)
        return entry.of(raw).to(self.device)

    @property
    def patched_on(self) -> torch.device:
        """Returns the device on which patches find weights: the host's memory, where they are streamed from there."""
        pinned = any(group.pinned is not None for group in self.groups.values())
        return torch.device("cpu") if pinned else self.device

    def patch(self, patches: Mapping[Key, Sequence[Patch]]) -> None:
        """Makes the weights the originals with these patches. No run may be going on.

        What stays in memory is written in place, from the bundle's files, so that addresses stay and nothing of the
        patches before is left. What is read from files before each use is patched as it arrives. After an error some
        weights are neither: call this again before the next run.

        Raises:
            DigestMismatch: a file was written to since it was hashed.
        """
        self._patches = patches
        if self.offload is not None:
            self.drop_but(frozenset())  # what stayed from the last call has the patches before
        if self._comes_from_files:
            return
        wanted = {(key, name) for key, rows in patches.items() for row in rows for name in row.weights}
        self._written |= wanted
        self._synchronize()
        for key in sorted({key for key, _ in self._written}):
            tensors = self._kept(self.groups[key])
            for name in sorted(name for owner, name in self._written if owner == key):
                self._restore(self.groups[key], name, tensors[name])
            for row in patches.get(key, ()):
                row.apply(tensors)
        self._synchronize()
        self._written = wanted

    def fill(self, fills: Mapping[tuple[Key, Hashable], Patch]) -> None:
        """Fills parts of weights, each under a name, in the place of what that name filled before. No run may go on.

        They are weights that no `patch` changes: nothing of them is read from the bundle's files again but where they
        are read before each use.
        """
        for (key, name), row in fills.items():
            self._fills.setdefault(key, {})[name] = row
        if self._comes_from_files:
            self.drop_but(frozenset())
            return
        self._synchronize()
        for (key, _), row in fills.items():
            row.apply(self._kept(self.groups[key]))
        self._synchronize()
        if self.offload is not None:
            self.drop_but(frozenset())

    def put(self, key: Key, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts tensors on the device in the place of weights of a group, wherever the group comes from."""
        self._beside.setdefault(key, {}).update(tensors)
        if key in self._here:
            self._here[key].result().update(tensors)

    @property
    def _comes_from_files(self) -> bool:
        """Returns True if weights are read from files before each use."""
        return self.offload is not None and not any(group.pinned is not None for group in self.groups.values())

    def follow(self, schedule: Sequence[Key], residency: Residency | None = None) -> Cursor | SlotCursor:
        """Starts a run that will use groups in this order.

        Args:
            schedule: the groups as they come into use.
            residency: says which of them stay between their uses, and what else is here leaves; by default none of
                them stays that is offloaded, and what else is here is left alone.
        """
        if self._slots is not None:
            return SlotCursor(self, schedule, self._slots.arena)
        if residency is not None:
            self.drop_but(residency.stays)
        return Cursor(self, schedule, residency or COMES_AND_GOES)

    def close(self) -> None:
        """Stops the prefetching thread and releases all weights."""
        if self._worker:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        if self._transfers is not None and self._slots is None:
            self._transfers.close()
        else:
            self._synchronize()  # pinned memory may still be copied from, and slots may be in use
        self._close_readers()
        self._here.clear()
        self._slots = None
        for group in self.groups.values():
            group.pinned = None

    def renew(self) -> None:
        """Starts afresh in a forked child: the prefetching thread is the parent's, and its weights never arrive."""
        self._counting = threading.Lock()
        if self._worker:
            self._worker = _worker()
        if self.offload is not None:
            self._here = {}
            self.bytes_now = self._slots.arena.nbytes if self._slots is not None else 0
            self.groups_now = 0

    @property
    def streams(self) -> bool:
        """Returns True if weights come through slots."""
        return self._slots is not None

    # -- for Recorder --

    def settle(self, keys: Iterable[Key]) -> None:
        """Brings groups into their slots, and makes work launched next wait for all that is on its way there."""
        assert self._transfers is not None, "what streams on a GPU has a stream of its own"
        self._transfers.follow()
        for key in keys:
            self._come(key)
        self._transfers.arrive()
        self._forget_events()

    @contextlib.contextmanager
    def moving(self) -> Iterator[Moves]:
        """Makes copies that start meanwhile a part of what the current stream does: all after, and all before."""
        assert self._transfers is not None, "what streams on a GPU has a stream of its own"
        self._transfers.follow()
        self._forget_events()
        self._moves = moves = Moves()
        try:
            yield moves
        finally:
            self._moves = None
            self._transfers.arrive()
            self._forget_events()

    def launched(self, moves: Moves) -> None:
        """Notes that a graph was launched in the current stream, which moves groups."""
        assert self._transfers is not None and self._slots is not None, "graphs move what streams"  # noqa: PT018
        arena = self._slots.arena
        left, displaced = moves.after(arena)
        self.lie((self.held() - displaced) | left)
        self.brought += len(moves.brought)
        self.bytes_brought += sum(arena.slots[key].nbytes for key in moves.brought)

    def lie(self, keys: Iterable[Key]) -> None:
        """Notes which groups are in their slots, once all is done that was launched in the current stream."""
        assert self._transfers is not None, "what streams on a GPU has a stream of its own"
        self._transfers.follow()
        self._forget_events()
        found = {key: self._here.get(key) or _done(self._in_slot(self.groups[key])) for key in keys}
        self._here, self.groups_now = found, len(found)

    def alone(self) -> frozenset[Key]:
        """Returns the groups whose slots no other group ever takes."""
        assert self._slots is not None, "what has no slots lies elsewhere"
        return frozenset(key for key, others in self._slots.arena.over.items() if not others)

    def _forget_events(self) -> None:
        """Forgets arrivals and uses, which what is launched next comes after anyway."""
        assert self._slots is not None, "what has no slots keeps its events"
        self._slots.forget_uses()
        for group in self.groups.values():
            group.arrived = None

    # -- for Cursor --

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        """Returns the group's tensors on the device, by name; brings the group in if necessary."""
        if self._slots is not None:
            self._come(key)
        elif key not in self._here:
            self._here[key] = _done(self._bring(key))
        if self._moves is not None and key not in self._moves.brought:
            self._moves.found.add(key)
        tensors = self._here[key].result()
        if self._transfers is not None and (arrived := self.groups[key].arrived) is not None:
            self._transfers.wait(arrived)
        return tensors

    def prefetch(self, key: Key) -> None:
        if self._slots is not None:
            self._come(key)
        elif self._worker and key not in self._here:
            self._here[key] = self._worker.submit(self._bring, key)

    def _come(self, key: Key) -> None:
        """Has a group come into its slot, unless it is there or on its way."""
        if key in self._here and not _has_failed(self._here[key]):
            return
        assert self._slots is not None, "what has no slots comes otherwise"
        for other in self._slots.arena.over[key] & self._here.keys():
            self.drop(other)
        if self.groups[key].pinned is not None:
            self._here[key] = _done(self._bring(key))  # launches a copy, and waits for nothing
        else:
            assert self._worker is not None, "a thread of its own reads what streams from files, one group at a time"
            self._here[key] = self._worker.submit(self._bring, key)

    def drop(self, key: Key) -> None:
        if self.offload is None or key not in self._here:
            return
        future = self._here.pop(key)
        # Waits for it, whatever came of it.
        if future.cancel() or future.exception() is not None:
            return
        with self._counting:
            self.groups_now -= 1
            if self._slots is not None:
                return
            self.bytes_now -= self.groups[key].nbytes
        if self._transfers is not None:
            stays = self._beside.get(key, {})
            self._transfers.leaves(tensor for name, tensor in future.result().items() if name not in stays)
            del future
            self._transfers.left()

    def drop_but(self, stays: frozenset[Key]) -> None:
        """Drops every group that is here but those that stay."""
        for key in set(self._here) - stays:
            self.drop(key)

    def held(self) -> set[Key]:
        return set(self._here)

    def used(self, key: Key) -> None:
        """Notes the last use of a group that streams: another one may take its slot."""
        if self._slots is not None:
            self._slots.used(key)

    # -- reading --

    def _bring(self, key: Key) -> dict[str, torch.Tensor]:
        group, slots = self.groups[key], self._slots
        if slots is None:
            return self._arrived(group, self._flat(group))
        self._fill(group, slots)
        if self._moves is None:
            self._count(slots.arena.slots[key].nbytes, 0)
        else:
            self._moves.brought.append(key)
        return self._in_slot(group)

    def _in_slot(self, group: Group) -> dict[str, torch.Tensor]:
        """Returns a group's tensors in its slot."""
        assert self._slots is not None, "what has no slots lies elsewhere"
        nbytes = group.nbytes if self._accelerator is None else group.layout.nbytes
        flat = self._slots.bytes_of(group.key, nbytes)
        return dict(self._tensors(group, flat)) | self._beside.get(group.key, {})

    def _bring_all(self, readers: Readers) -> None:
        """Reads every group into memory, the largest first, since one thread hashes a file."""
        buffers = self._mapped() if self._share else {}
        jobs: list[Job] = []
        for key in sorted(self.groups.keys() - buffers.keys(), key=lambda key: self.groups[key].nbytes, reverse=True):
            buffers[key] = torch.empty(self.groups[key].nbytes, dtype=torch.uint8)
            jobs += self._reading(self.groups[key], memoryview(buffers[key].numpy().data))
        readers.run(jobs)
        for key, buffer in buffers.items():
            self._here[key] = _done(self._arrived(self.groups[key], buffer))

    def _mapped(self) -> dict[Key, torch.Tensor]:
        """Returns the groups that lie in memory that processes share."""
        found = {}
        for key, group in self.groups.items():
            whole = self._verified.shared(group.file, group.offset) if group.nbytes else None
            if whole is not None:
                found[key] = torch.frombuffer(whole, dtype=torch.uint8, offset=group.offset, count=group.nbytes)
        return found

    def _reading(self, group: Group, view: memoryview) -> Iterator[Job]:
        """Yields jobs that read a group: in pieces, or as a whole if that hashes the file."""
        size = _PIECE if self._verified.is_hashed(group.file) else max(len(view), 1)
        for start in range(0, len(view), size):
            piece, offset = view[start : start + size], group.offset + start
            yield partial(self._verified.read_into, group.file, piece, offset)

    def _arrived(self, group: Group, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        self._count(group.nbytes, group.nbytes)
        return dict(self._tensors(group, flat)) | self._beside.get(group.key, {})

    def _count(self, brought: int, taken: int) -> None:
        """Counts a group that comes in, and the memory that it takes besides what it found."""
        with self._counting:
            self.brought += 1
            self.bytes_brought += brought
            self.groups_now += 1
            self.bytes_now += taken
            self.bytes_peak = max(self.bytes_peak, self.bytes_now)
            self.groups_peak = max(self.groups_peak, self.groups_now)

    def _tensors(self, group: Group, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        clean = self._accelerator is not None or self._slots is not None
        for name, entry in group.entries.items():
            start = entry.start if self._accelerator is None else group.layout.starts[name]
            raw = flat[start : start + entry.nbytes]
            yield name, entry.view_of(raw) if clean else entry.of(raw)

    def _clean(self, group: Group, flat: torch.Tensor) -> None:
        """Makes the bytes of booleans 0 or 1, of a group that has just been read, in the current stream."""
        for name, entry in group.entries.items():
            start = entry.start if self._accelerator is None else group.layout.starts[name]
            entry.clean(flat[start : start + entry.nbytes])

    def _flat(self, group: Group) -> torch.Tensor:
        """Returns the group's data as one buffer on the device."""
        there = self._accelerator
        if there is None:
            return self._patched(group, self._read(group, _pages(group.nbytes)))

        def copy() -> torch.Tensor:
            return self._copied(group, there.empty(group.layout.nbytes), there)

        if self._transfers is not None:
            flat, group.arrived = self._transfers.bring(copy)
            return flat
        with there.active():
            return copy()

    def _fill(self, group: Group, slots: Slots) -> None:
        """Brings a group into its slot, once what lay there was used for the last time."""
        there = self._accelerator
        if there is None:
            flat = self._read(group, slots.bytes_of(group.key, group.nbytes))
            self._clean(group, flat)
            self._patched(group, flat)
            return
        flat = slots.bytes_of(group.key, group.layout.nbytes)
        assert self._transfers is not None, "what streams has a stream of its own"
        free = slots.last_uses(group.key)  # by now: a copy that was called off before has not waited for them
        group.arrived = self._transfers.fill(lambda: self._copied(group, flat, there), free)

    def _copied(self, group: Group, flat: torch.Tensor, there: Accelerator) -> torch.Tensor:
        """Copies a group to the device in the current stream: at once from host memory, or in pieces from its file."""
        if group.pinned is not None:
            if flat.numel():
                there.copy(flat, group.pinned)
            return flat
        assert self._staging is not None, "a device has buffers to stage files in"
        self._staging.bring(group.file, group.offset, group.nbytes, group.layout, flat)
        self._clean(group, flat)
        return self._patched(group, flat)

    def _fill_host(self, there: Accelerator) -> None:
        """Puts every group into host memory, laid out as on the device, so that one copy brings it there."""
        starts, size = {}, 0
        for key, group in self.groups.items():
            starts[key] = size
            size += -(-group.layout.nbytes // ALIGNMENT) * ALIGNMENT
        whole = there.pinned(size)
        for key, group in self.groups.items():
            group.pinned = whole[starts[key] : starts[key] + group.layout.nbytes]
            for source, to, length in group.layout.copies:
                self._reader.fill(group.file, group.pinned[to : to + length], group.offset + source)
            self._clean(group, group.pinned)

    # -- patches --

    def _patched(self, group: Group, flat: torch.Tensor) -> torch.Tensor:
        """Patches a group that has just been read from its file, in the current stream."""
        if rows := [*self._patches.get(group.key, ()), *self._fills.get(group.key, {}).values()]:
            tensors = dict(self._tensors(group, flat))
            for row in rows:
                row.apply(tensors)
        return flat

    def _kept(self, group: Group) -> Mapping[str, torch.Tensor]:
        """Returns a group's tensors where they stay: on the device, or in the host's memory."""
        if group.pinned is None:
            return self._here[group.key].result()
        return dict(self._tensors(group, group.pinned))

    def _restore(self, group: Group, name: str, tensor: torch.Tensor) -> None:
        """Writes a weight's original from the bundle's file over what is there."""
        entry = group.entries[name]
        here = tensor.device.type == "cpu"
        raw = entry.bytes_of(tensor) if here else torch.empty(entry.nbytes, dtype=torch.uint8)
        self._verified.read_into(group.file, memoryview(raw.numpy().data), group.offset + entry.start)
        if not here:
            tensor.copy_(entry.of(raw))

    def _synchronize(self) -> None:
        """Waits until the device has done what other threads launched, and this one."""
        if self._transfers is not None:
            self._transfers.close()
        if self._accelerator is not None:
            with self._accelerator.active():
                self._accelerator.default_stream().synchronize()
                self._accelerator.current_stream().synchronize()

    def _read(self, group: Group, buffer: torch.Tensor) -> torch.Tensor:
        return self._reader.fill(group.file, buffer, group.offset)

    def _close_readers(self) -> None:
        self._reader.close()
        if self._staging is not None:
            self._staging.close()


class Cursor:
    """One run's place in its schedule: `enter` before a group's use, `leave` after it."""

    def __init__(self, store: WeightStore, schedule: Sequence[Key], residency: Residency) -> None:
        self._store, self._schedule, self._residency, self._next = store, schedule, residency, 0
        self._uses: dict[Key, int] = {}  # group → which use of the schedule its last one was

    def enter(self, key: Key) -> Mapping[str, torch.Tensor]:
        """Returns the tensors of the group by name, on the device, and starts to bring in the next group."""
        tensors = self._store.get(key)
        while self._next < len(self._schedule) and self._schedule[self._next] != key:
            self._next += 1
        self._uses[key] = self._next
        self._next += 1
        if self._residency.ahead and self._next < len(self._schedule):
            self._store.prefetch(self._schedule[self._next])
        return tensors

    def leave(self, key: Key) -> None:
        """Marks the group as not needed now. It stays if the plan says so, or if it is the next to come ahead."""
        use, keeps = self._uses.get(key, len(self._schedule)), self._residency.keeps
        if use < len(keeps) and keeps[use]:
            return
        coming = self._schedule[self._next] if self._next < len(self._schedule) else None
        if not self._residency.ahead or coming != key:
            self._store.drop(key)

    def close(self) -> None:
        """Releases what this run brought in, but for what stays until the next one; also after an error."""
        self._store.drop_but(self._residency.stays)


#: The plan of a run for which none was made.
COMES_AND_GOES = Residency("group", ahead=True)


def _pages(nbytes: int) -> torch.Tensor:
    """Returns bytes in pages of their own, which go back to the system when they are let go.

    The C library would keep those of less than 32 MiB for itself, so that groups that come and go added up.
    """
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)


def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "diffkiln-weights")


def _has_failed(future: Future[dict[str, torch.Tensor]]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _done(tensors: dict[str, torch.Tensor]) -> Future[dict[str, torch.Tensor]]:
    future: Future[dict[str, torch.Tensor]] = Future()
    future.set_result(tensors)
    return future
