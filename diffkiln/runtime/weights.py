"""The weight store: where weights are looked up at each call, and when they are in memory.

Weights lie in *groups*, one safetensors file each: the repeated blocks (or several of them) and the rest of a
component. Without offloading every group stays on the device. With it a group is brought in ahead of its use and leaves
after it: the program says exactly when, so the store follows a schedule instead of guessing.
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffkiln.bundle import GroupRow, Job, Readers, Verified
from diffkiln.bundle.layout import CHANNELS_LAST, UNUSED
from diffkiln.errors import IntegrityError, ManifestInvalid
from diffkiln.guards import forks
from diffkiln.guards.limits import active
from diffkiln.interpreter.aten import dtype_name
from diffkiln.program import TensorType
from diffkiln.runtime.accelerator import Accelerator, Event, accelerator
from diffkiln.runtime.staging import Reader, Staging
from diffkiln.runtime.transfers import ALIGNMENT, Layout, TransferQueue, aligned, copied

#: (component, group name)
Key = tuple[str, str]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
#: What one reader takes at a time of a file that has been hashed.
_PIECE = 1 << 26


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype, shape as it lies there, and its bytes [start, end) in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    channels_last: bool = False

    @property
    def used_shape(self) -> tuple[int, ...]:
        """The shape in which programs use the tensor."""
        if not self.channels_last:
            return self.shape
        count, height, width, channels = self.shape
        return count, channels, height, width

    def of(self, raw: torch.Tensor) -> torch.Tensor:
        """The tensor, a view of its bytes."""
        # A byte that is neither 0 nor 1 is no boolean: compilers take it for one or the other, as it suits them.
        tensor = (raw != 0 if self.dtype == torch.bool else raw.view(self.dtype)).reshape(self.shape)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor


@dataclass
class Group:
    """One file: its tensors, where its data begins and how many bytes it has."""

    key: Key
    file: str
    entries: Mapping[str, Entry]
    offset: int
    nbytes: int
    layout: Layout  # on a GPU
    pinned: torch.Tensor | None = None  # host copy, when it is streamed to a GPU from host memory
    arrived: Event | None = None  # of its last copy to a GPU


def read_table(path: str, size: int, pread: Callable[[int, int], bytes]) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file as it stands there, within limits, and its length in bytes.

    Args:
        path: Its name, for messages.
        size: Its size in bytes.
        pread: Gives so many bytes of it, from an offset on.

    Raises:
        ManifestInvalid: The header is no JSON object.
        LimitExceeded: It is longer, or has more rows, than the limits allow.
    """
    if size < 8:
        raise ManifestInvalid(f"{path!r} is too short for a safetensors file")
    (length,) = struct.unpack("<Q", pread(8, 0))
    if length > size - 8:
        raise ManifestInvalid(f"{path!r}: its header claims {length} bytes of {size}")
    active().check("header_bytes", length, path)
    try:
        table = json.loads(pread(length, 8))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: {error}") from None
    if not isinstance(table, dict):
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: it is no object")
    active().check("header_rows", len(table), path)
    return table, length


def read_header(verified: Verified, path: str) -> tuple[dict[str, Entry], int, int]:
    """The tensors of a safetensors file, the offset of its data and the data's size, all checked for consistency.

    Raises:
        ManifestInvalid: the header is not one.
        LimitExceeded: it is longer, or has more rows, than the limits allow.
    """
    size = verified.size(path)
    table, length = read_table(path, size, partial(verified.peek, path))
    data = size - 8 - length
    try:
        turned = json.loads(table.get("__metadata__", {}).get(CHANNELS_LAST, "[]"))
        if not isinstance(turned, list) or any(len(table[name]["shape"]) != 4 for name in turned):
            raise ValueError(f"{CHANNELS_LAST} must list tensors of four dimensions")
        last = set(turned)
        entries = {name: _entry(row, data, name in last) for name, row in table.items() if name != "__metadata__"}
        _refuse_overlaps(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: {error}") from None
    return entries, 8 + length, data


def _entry(row: Mapping[str, Any], size: int, channels_last: bool) -> Entry:
    dtype, (start, end) = _DTYPES[row["dtype"]], row["data_offsets"]
    shape = tuple(row["shape"])
    if not all(type(n) is int for n in (start, end, *shape)) or any(n < 0 for n in shape):
        raise ValueError(f"a tensor {row} whose sizes are not whole numbers")
    # Zeros count as one: torch multiplies from left to right and must not overflow on the way.
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError(f"a tensor {row} of more elements than 64 bits count")
    if not 0 <= start <= end <= size or math.prod(shape) * dtype.itemsize != end - start or start % dtype.itemsize:
        raise ValueError(f"a tensor {row} that does not fit {size} bytes")
    return Entry(dtype, shape, start, end, channels_last)


def _refuse_overlaps(entries: Mapping[str, Entry]) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise ValueError(f"the tensor {name} begins before another one ends")
        end = entry.end


class WeightStore:
    """Brings groups of weights to the device and counts what is there.

    Args:
        verified: the bundle; weights are read through its held descriptors.
        groups: the manifest's table of weights.
        device: where weights are used.
        offload: the spec's offload policy as JSON, or None to keep everything on the device.
        on: stands for the device; None finds it.
        readers: read resident weights, several files at a time.

    Attributes:
        bytes_now, bytes_peak: weights on the device, in bytes.
        groups_now, groups_peak: the same in groups.
        brought: how many times a group was brought in.
    """

    def __init__(
        self,
        verified: Verified,
        groups: Mapping[str, Sequence[GroupRow]],
        device: torch.device,
        offload: Mapping[str, Any] | None,
        on: Accelerator | None = None,
        readers: Readers | None = None,
    ) -> None:
        self.device, self.offload = device, offload
        self._verified = verified
        self._accelerator = on or accelerator(device)
        self._reader = Reader(lambda file, view, offset: verified.read_into(file, view, offset))
        self._staging = Staging(self._accelerator, self._reader) if self._accelerator else None
        self.groups: dict[Key, Group] = {}
        self._of_weight: dict[tuple[str, str], Key] = {}
        for component, rows in groups.items():
            for row in rows:
                if row.name != UNUSED:
                    self._add(component, row)
        self.bytes_now = self.bytes_peak = self.groups_now = self.groups_peak = self.brought = 0
        self._counting = threading.Lock()
        self._here: dict[Key, Future[dict[str, torch.Tensor]]] = {}
        ahead = offload is not None and offload.get("use_stream", True)
        self._worker = _worker() if ahead else None
        self._transfers = TransferQueue(self._accelerator) if ahead and self._accelerator else None
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

    def key_of(self, component: str, weight: str) -> Key:
        """The group that holds a weight."""
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
        """A copy of one weight on the device, read by itself."""
        group = self.groups[self.key_of(component, weight)]
        entry = group.entries[weight]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        self._verified.read_into(group.file, memoryview(raw.numpy().data), group.offset + entry.start)
        return entry.of(raw).to(self.device)

    def follow(self, schedule: Sequence[Key]) -> Cursor:
        """Start a run that will use groups in this order."""
        return Cursor(self, schedule)

    def close(self) -> None:
        """Stop the prefetching thread and let go of all weights."""
        if self._worker:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        if self._transfers is not None:
            self._transfers.close()
        self._close_readers()
        self._here.clear()
        for group in self.groups.values():
            group.pinned = None

    def renew(self) -> None:
        """In a forked child: the prefetching thread is the parent's, and what it was bringing in never arrives."""
        self._counting = threading.Lock()
        if self._worker:
            self._worker = _worker()
        if self.offload is not None:
            self._here = {}
            self.bytes_now = self.groups_now = 0

    # -- for Cursor --

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        """The group's tensors on the device, by name; brings it in if it is not there."""
        if key not in self._here:
            self._here[key] = _done(self._bring(key))
        tensors = self._here[key].result()
        if self._transfers is not None and (arrived := self.groups[key].arrived) is not None:
            self._transfers.wait(arrived)
        return tensors

    def prefetch(self, key: Key) -> None:
        if self._worker and key not in self._here:
            self._here[key] = self._worker.submit(self._bring, key)

    def drop(self, key: Key) -> None:
        if self.offload is None or key not in self._here:
            return
        future = self._here.pop(key)
        # Waits for it, whatever came of it.
        if future.cancel() or future.exception() is not None:
            return
        with self._counting:
            self.bytes_now -= self.groups[key].nbytes
            self.groups_now -= 1
        if self._transfers is not None:
            self._transfers.leaves(future.result().values())
            del future
            self._transfers.left()

    def held(self) -> set[Key]:
        return set(self._here)

    # -- reading --

    def _add(self, component: str, row: GroupRow) -> None:
        entries, offset, nbytes = read_header(self._verified, row.file)
        key = (component, row.name)
        self.groups[key] = Group(key, row.file, entries, offset, nbytes, aligned(entries))
        for name in entries:
            self._of_weight[component, name] = key

    def _bring(self, key: Key) -> dict[str, torch.Tensor]:
        group = self.groups[key]
        return self._arrived(group, self._flat(group))

    def _bring_all(self, readers: Readers) -> None:
        """Read every group into memory, the largest first, since a file that has to be hashed is one thread's."""
        buffers = {key: torch.empty(group.nbytes, dtype=torch.uint8) for key, group in self.groups.items()}
        jobs: list[Job] = []
        for key in sorted(buffers, key=lambda key: self.groups[key].nbytes, reverse=True):
            jobs += self._reading(self.groups[key], memoryview(buffers[key].numpy().data))
        readers.run(jobs)
        for key, buffer in buffers.items():
            self._here[key] = _done(self._arrived(self.groups[key], buffer))

    def _reading(self, group: Group, view: memoryview) -> Iterator[Job]:
        """What reads a group: in pieces, or whole where that hashes the file."""
        size = _PIECE if self._verified.is_hashed(group.file) else max(len(view), 1)
        for start in range(0, len(view), size):
            piece, offset = view[start : start + size], group.offset + start
            yield partial(self._verified.read_into, group.file, piece, offset)

    def _arrived(self, group: Group, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        with self._counting:
            self.brought += 1
            self.bytes_now += group.nbytes
            self.groups_now += 1
            self.bytes_peak = max(self.bytes_peak, self.bytes_now)
            self.groups_peak = max(self.groups_peak, self.groups_now)
        return dict(self._tensors(group, flat))

    def _tensors(self, group: Group, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in group.entries.items():
            start = entry.start if self._accelerator is None else group.layout.starts[name]
            yield name, entry.of(flat[start : start + entry.end - entry.start])

    def _flat(self, group: Group) -> torch.Tensor:
        """The group's data as one buffer on the device."""
        there = self._accelerator
        if there is None or self._staging is None:
            return self._read(group, torch.empty(group.nbytes, dtype=torch.uint8))
        pinned, staging = group.pinned, self._staging

        def copy() -> torch.Tensor:
            if pinned is not None:
                return copied(pinned, group.layout, there)
            return staging.bring(group.file, group.offset, group.nbytes, group.layout)

        if self._transfers is not None:
            flat, group.arrived = self._transfers.bring(copy)
            return flat
        with there.active():
            return copy()

    def _fill_host(self, there: Accelerator) -> None:
        """Every group in memory of the host, from which it is brought in: one piece of exactly their size."""
        starts, size = {}, 0
        for key, group in self.groups.items():
            starts[key] = size
            size += -(-group.nbytes // ALIGNMENT) * ALIGNMENT
        arena = there.pinned(size)
        for key, group in self.groups.items():
            group.pinned = self._read(group, arena[starts[key] : starts[key] + group.nbytes])

    def _read(self, group: Group, buffer: torch.Tensor) -> torch.Tensor:
        return self._reader.fill(group.file, buffer, group.offset)

    def _close_readers(self) -> None:
        self._reader.close()
        if self._staging is not None:
            self._staging.close()


class Cursor:
    """One run's place in its schedule: `enter` before a group's use, `leave` after it."""

    def __init__(self, store: WeightStore, schedule: Sequence[Key]) -> None:
        self._store, self._schedule, self._next = store, schedule, 0
        self._used: set[Key] = set()

    def enter(self, key: Key) -> Mapping[str, torch.Tensor]:
        """Tensors of the group by name, on the device. The group after it starts to come in."""
        tensors = self._store.get(key)
        self._used.add(key)
        while self._next < len(self._schedule) and self._schedule[self._next] != key:
            self._next += 1
        self._next += 1
        if self._next < len(self._schedule):
            self._store.prefetch(self._schedule[self._next])
        return tensors

    def leave(self, key: Key) -> None:
        """The group is not needed now; it stays only if it is the next one."""
        self._used.discard(key)
        if self._next >= len(self._schedule) or self._schedule[self._next] != key:
            self._store.drop(key)

    def close(self) -> None:
        """Let go of everything that this run brought in, also after an error."""
        for key in self._store.held():
            self._store.drop(key)


def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "diffkiln-weights")


def _done(tensors: dict[str, torch.Tensor]) -> Future[dict[str, torch.Tensor]]:
    future: Future[dict[str, torch.Tensor]] = Future()
    future.set_result(tensors)
    return future
