"""The device that a bundle runs on, as far as the runtime asks anything of it.

Nothing else in the runtime names `torch.cuda`. So the tests put a simulated device in the place of a GPU, and another
kind of device would be one more class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffkiln.guards.printable import get_logger

log = get_logger(__name__)


class Stream(Protocol):
    """A queue of a device's work, in order."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


class Event(Protocol):
    """A place in a stream. `synchronize` makes the host wait until the device has reached it."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class Memory:
    """A device's memory in bytes: free, total, and used by torch's tensors."""

    free: int
    total: int
    taken: int


class Accelerator(Protocol):
    """One device with queues of its own."""

    device: torch.device

    def active(self) -> AbstractContextManager[object]:
        """Returns a context in which the device is the current one of this thread."""
        ...

    def stream(self) -> Stream: ...

    def current_stream(self) -> Stream: ...

    def default_stream(self) -> Stream: ...

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Returns a context in which this thread launches on the stream."""
        ...

    def event(self) -> Event: ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """Returns that many bytes on the device."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Returns exactly that many bytes of the host, which the device copies from while the host goes on."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies bytes of the host in the current stream; the host does not wait."""
        ...

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keeps a tensor's memory, once the tensor is let go, until the stream has done what it has by now."""
        ...

    def memory(self) -> Memory: ...

    def release(self) -> None:
        """Gives memory back that torch holds and nobody uses."""
        ...


class Cuda:
    """An NVIDIA GPU; `device` has an index."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.device)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def default_stream(self) -> Stream:
        return torch.cuda.default_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def event(self) -> Event:
        return torch.cuda.Event()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        # torch's own pinned memory is rounded up to a power of two (CachingHostAllocator), up to twice what is asked.
        tensor = torch.empty(nbytes, dtype=torch.uint8)
        if not nbytes:
            return tensor
        address = tensor.data_ptr()
        with self.active():
            failed = _registered(address, nbytes)
        if failed:
            log.warning(
                "%.1f GB of the host cannot be pinned (%s), so weights are brought in more slowly. Raise the limit of "
                "locked memory (ulimit -l), or free memory",
                nbytes / 1e9,
                failed,
            )
        else:
            runtime: Any = torch.cuda.cudart()
            weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, address)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.device)
        return Memory(free, total, torch.cuda.memory_allocated(self.device))

    def release(self) -> None:
        with self.active():
            torch.cuda.empty_cache()


def _registered(address: int, nbytes: int) -> str:
    """Returns the reason if memory of the host cannot be pinned; pins it and returns nothing otherwise."""
    runtime: Any = torch.cuda.cudart()
    try:
        code = int(runtime.cudaHostRegister(address, nbytes, 0))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return f"CUDA error {code}" if code else ""


#: Makes a device's accelerator, by the device's type. Others, such as the CPU, have none.
_KINDS: dict[str, Callable[[torch.device], Accelerator]] = {"cuda": Cuda}


def accelerator(device: torch.device) -> Accelerator | None:
    """Returns what stands for a device; None for the CPU, which has no queues and no memory of its own."""
    make = _KINDS.get(device.type)
    return make(indexed(device)) if make else None


def indexed(device: torch.device) -> torch.device:
    """Returns the device with its number: `cuda` means the current GPU of this thread, now and not at each use."""
    if device.type != "cuda" or device.index is not None or not available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Peak:
    """The most memory of a GPU, in bytes: that torch's tensors used, and that torch held for them."""

    allocated: int
    reserved: int


def forget_peak(device: torch.device) -> None:
    """Begins to look anew for the most memory that a GPU uses; does nothing for the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> Peak | None:
    """Returns the most memory that a GPU used since `forget_peak`; None for the CPU, which has none of its own."""
    if device.type != "cuda":
        return None
    return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def uuid_of(device: torch.device) -> str:
    """Returns the name that NVIDIA's driver has for a GPU, such as "GPU-3a9c…"; it stays where numbers change."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def wait(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given; does nothing for the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available() -> bool:
    """Returns True if torch can use a GPU here."""
    return torch.cuda.is_available()


def count() -> int:
    """Returns how many GPUs torch can use."""
    return torch.cuda.device_count()


def capability(device: torch.device | None = None) -> tuple[int, int] | None:
    """Returns a GPU's compute capability, such as (8, 9); by default the current one's. None without a GPU."""
    return torch.cuda.get_device_capability(device) if available() else None


def model(device: torch.device) -> str:
    """Returns a GPU's name and SM, such as "NVIDIA H200 sm_90"."""
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} sm_{gpu.major}{gpu.minor}"


def active(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which a device is the current one; one that does nothing for the CPU, or without a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" and available() else nullcontext()


class CudaCapture:
    """A recorder by torch's graphs. All graphs share memory, as they are replayed in the order of their recording."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Callable[[], Sequence[torch.Tensor]], ready: Callable[[], None]
    ) -> tuple[Callable[[], object], Sequence[torch.Tensor]]:
        """Records what `run` launches; `ready` is called before each of its two runs, and is not recorded."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            ready()
            run()  # libraries make their handles and load their kernels at first use, which cannot be recorded
        here.wait_stream(self._stream)
        with torch.cuda.stream(self._stream):
            ready()
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like: a graph is of this one's launches. A recording that fails leaves its stream
        # the current one, and the context around it does not.
        recorded = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), recorded:
            outputs = run()
        return graph.replay, outputs
