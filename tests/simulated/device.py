"""An accelerator whose queues run late.

Nothing that is launched runs before somebody waits for it, or a schedule lets it. So a copy that nobody waits for has
not happened when its bytes are read: they are poison. Memory that is let go is given again as torch's caching allocator
gives it, and is poisoned then, in the order of the stream that it belongs to. The tensors are the CPU's.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from diffkiln.runtime.accelerator import Memory
from tests.simulated.clocks import Accesses, Clock, Race

#: What memory holds that nobody has written, or that was let go.
POISON = 0xFF
HOST = "host"
_PAGE = 512


class OutOfMemory(RuntimeError):
    """The device's memory does not suffice."""


@dataclass(eq=False)
class Block:
    """A piece of memory and the stream that it belongs to; `used` by those of others that were told of."""

    number: int
    bytes: np.ndarray
    owner: Stream | None
    used: set[Stream] = field(default_factory=set)


@dataclass
class _Op:
    what: str
    run: Callable[[], None]
    seconds: float
    waits: list[tuple[Stream, int]]


class Stream:
    """A queue. `launched` operations were put into it, and `done` of them have run."""

    def __init__(self, device: Simulated, name: str) -> None:
        self._device, self.name = device, name
        self.clock = Clock()
        self.launched = self.done = 0
        self.time = 0.0
        self._queue: deque[_Op] = deque()
        self._waits: list[tuple[Stream, int]] = []

    def wait_event(self, event: Event) -> None:
        with self._device.lock:
            if event.stream is not None:
                self._waits.append((event.stream, event.place))
                self.clock.join(event.clock)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self._device)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        if self._waits:  # which are in the queue, too
            self.launch("wait", lambda: None)
        event = Event(self._device)
        event.record(self)
        event.synchronize()

    def launch(self, what: str, run: Callable[[], None], seconds: float = 0.0) -> Clock:
        """Puts an operation into the queue; gives the clock at which it runs."""
        with self._device.lock:
            self.clock.join(self._device.clock)
            self.launched += 1
            self.clock[self.name] = self.launched
            self._queue.append(_Op(what, run, seconds, self._waits))
            self._waits = []
            at = self.clock.copy()
            self._device.let_run()
        return at

    def run_to(self, place: int) -> None:
        """Runs what is in the queue up to there, and first what that waits for."""
        while self.done < place:
            op = self._queue.popleft()
            for stream, other in op.waits:
                stream.run_to(other)
                self.time = max(self.time, stream.time)
            op.run()
            self.time += op.seconds
            self.done += 1


class Event:
    """A place in a stream."""

    def __init__(self, device: Simulated) -> None:
        self._device = device
        self.stream: Stream | None = None
        self.place, self.clock = 0, Clock()

    def record(self, stream: Any = None) -> None:
        with self._device.lock:
            self.stream = stream or self._device.current_stream()
            self.stream.clock.join(self._device.clock)
            self.place, self.clock = self.stream.launched, self.stream.clock.copy()

    def synchronize(self) -> None:
        with self._device.lock:
            if self.stream is not None:
                self.stream.run_to(self.place)
                self._device.clock.join(self.clock)


class Simulated:
    """One simulated device.

    Args:
        capacity: bytes of its memory.
        bandwidth: of copies from the host, in bytes a virtual second.
        schedule: a number for each launch, which says what may run then (`let_run`). Without one nothing runs until
            somebody waits for it.
    """

    def __init__(self, capacity: int = 2**40, bandwidth: float = 55e9, schedule: Iterable[int] = ()) -> None:
        self.device = torch.device("cuda:0")
        self.lock = threading.RLock()
        self.clock = Clock()
        self.capacity, self.bandwidth = capacity, bandwidth
        self.taken = self.peak = self.pinned_bytes = self.allocations = 0
        self._schedule = iter(schedule)
        self._accesses = Accesses()
        self._numbers, self._names = count(), count()
        self._default = Stream(self, "compute")
        self._streams = [self._default]
        self._current = threading.local()
        self._blocks: dict[int, Block] = {}
        self._free: list[Block] = []
        self._leaving: list[tuple[Block, list[Event]]] = []

    @property
    def races(self) -> list[Race]:
        return self._accesses.races

    # -- as an accelerator --

    def active(self) -> Any:
        return nullcontext()

    def stream(self) -> Stream:
        made = Stream(self, f"copies {next(self._names)}")
        self._streams.append(made)
        return made

    def current_stream(self) -> Stream:
        return getattr(self._current, "stream", self._default)

    def default_stream(self) -> Stream:
        return self._default

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def event(self) -> Event:
        return Event(self)

    def empty(self, nbytes: int) -> torch.Tensor:
        with self.lock:
            self.allocations += 1
            return self._handed_out(self._allocated(nbytes, self.current_stream()), nbytes)

    def pinned(self, nbytes: int) -> torch.Tensor:
        with self.lock:
            block = Block(next(self._numbers), _poison(nbytes), None)
            self.pinned_bytes += block.bytes.nbytes
            return self._handed_out(block, nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        (there, to), (here, start) = self._place(target), self._place(source)
        size = source.numel()

        def run() -> None:
            there.bytes[to : to + size] = here.bytes[start : start + size]

        at = self.current_stream().launch("copy", run, size / self.bandwidth)
        with self.lock:
            self._accesses.add(here.number, (start, start + size), False, at, "copy")
            self._accesses.add(there.number, (to, to + size), True, at, "copy")

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        with self.lock:
            self._place(tensor)[0].used.add(stream)

    def memory(self) -> Memory:
        return Memory(self.capacity - self.taken, self.capacity, self.taken)

    def release(self) -> None:
        with self.lock:
            self._settle()
            self.taken -= sum(block.bytes.nbytes for block in self._free)
            self._free.clear()

    # -- for tests --

    def compute(self, what: str, tensors: Sequence[torch.Tensor], see: Callable[[list[bytes]], None]) -> None:
        """Launches an operation that reads tensors; `see` gets their bytes when it runs."""
        spans = [(*self._place(tensor), tensor.numel() * tensor.itemsize) for tensor in tensors]

        def run() -> None:
            see([block.bytes[start : start + size].tobytes() for block, start, size in spans])

        at = self.current_stream().launch(what, run)
        with self.lock:
            for block, start, size in spans:
                self._accesses.add(block.number, (start, start + size), False, at, what)

    def reach(self, what: str, tensors: Iterable[torch.Tensor]) -> None:
        """Launches an operation that reads tensors, and lets its stream run so far, with all that this waits for.

        What reads the tensors next sees what the operation would see when it runs. Tensors of others are left out.
        """
        own = [tensor for tensor in tensors if self.holds(tensor)]
        if not own:
            return
        with self.lock:
            self.compute(what, own, lambda _: None)
            stream = self.current_stream()
            stream.run_to(stream.launched)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Returns True if a tensor lies in the device's memory, or in what is pinned for it."""
        return self._found(tensor.data_ptr()) is not None

    def on_host(self, what: str, view: memoryview) -> None:
        """Notes that the host writes to memory now."""
        with self.lock:
            address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
            for base, block in self._blocks.items():
                if base <= address < base + block.bytes.nbytes:
                    span = (address - base, address - base + len(view))
                    self._accesses.add(block.number, span, True, self._at_host(), what)

    def finish(self) -> None:
        """Runs all that was launched, the oldest stream first."""
        with self.lock:
            for stream in self._streams:
                stream.run_to(stream.launched)

    def let_run(self) -> None:
        """As much as the schedule says: a number n runs n // streams operations of the stream n % streams."""
        draw = next(self._schedule, 0)
        stream = self._streams[draw % len(self._streams)]
        stream.run_to(min(stream.launched, stream.done + draw // len(self._streams)))

    # -- memory --

    def _allocated(self, nbytes: int, stream: Stream) -> Block:
        self._settle()
        size = -(-max(nbytes, 1) // _PAGE) * _PAGE
        for block in self._free:
            if block.bytes.nbytes == size and block.owner is stream:
                self._free.remove(block)
                at = stream.launch("another use of memory", partial(block.bytes.fill, POISON))
                self._accesses.add(block.number, (0, size), True, at, "another use of memory")
                return block
        if self.taken + size > self.capacity:
            raise OutOfMemory(f"{size} bytes of {self.capacity - self.taken} free")
        self.taken += size
        self.peak = max(self.peak, self.taken)
        return Block(next(self._numbers), _poison(size), stream)

    def _handed_out(self, block: Block, nbytes: int) -> torch.Tensor:
        """A tensor of the block's memory, which lets the block go with its last view."""
        array = block.bytes[:nbytes].view()
        self._blocks[array.__array_interface__["data"][0]] = block
        weakref.finalize(array, self._let_go, block).atexit = False
        return torch.from_numpy(array)

    def _let_go(self, block: Block) -> None:
        with self.lock:
            if block.owner is None:  # memory of the host, which the system may give to others at once
                self.pinned_bytes -= block.bytes.nbytes
                at = self._at_host()
                self._accesses.add(block.number, (0, block.bytes.nbytes), True, at, "pinned memory is given back")
                block.bytes.fill(POISON)
                return
            others, block.used = block.used - {block.owner}, set()
            events = []
            for stream in others:
                events.append(Event(self))
                events[-1].record(stream)
            self._leaving.append((block, events))
            self._settle()

    def _settle(self) -> None:
        """Takes back what other streams have done with, as far as the device has got."""
        left = []
        for block, events in self._leaving:
            if all(event.stream.done >= event.place for event in events):
                for event in events:
                    self.clock.join(event.clock)
                self._free.append(block)
            else:
                left.append((block, events))
        self._leaving = left

    def _at_host(self) -> Clock:
        self.clock[HOST] = self.clock.get(HOST, 0) + 1
        return self.clock.copy()

    def _place(self, tensor: torch.Tensor) -> tuple[Block, int]:
        found = self._found(tensor.data_ptr())
        assert found is not None, "the tensor's memory is not the device's"
        return found

    def _found(self, address: int) -> tuple[Block, int] | None:
        for base, block in self._blocks.items():
            if base <= address < base + max(block.bytes.nbytes, 1):
                return block, address - base
        return None


def _poison(nbytes: int) -> np.ndarray:
    return np.full(max(nbytes, 1), POISON, np.uint8)
