"""Weights on a simulated GPU: at every pace each is there when it is read, and no memory is reused too early.

Each known mistake is made on purpose as well, and must be found.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffkiln.program.streaming import Arena
from diffkiln.runtime.staging import Staging
from diffkiln.runtime.transfers import TransferQueue
from diffkiln.runtime.weights import Cursor, Key, WeightStore
from tests.simulated import OutOfMemory, Simulated

BLOCKS = 5
REST: Key = ("unet", "rest")
#: Bytes of a group's data, of which one tensor is most; and of a staging buffer, so that a group takes several.
SIZE, BUFFER = 6 * 1024, 2048


class Files:
    """A bundle's weights, read as `Verified` reads them."""

    def __init__(self, folder: Path) -> None:
        self.device: Simulated | None = None
        self.bytes: dict[str, bytes] = {}
        self.rows = []
        for index, name in enumerate(["rest", *map(str, range(BLOCKS))]):
            file = str(folder / f"{name}.safetensors")
            save_file({f"{name}.w": torch.full((SIZE // 4,), float(index)), f"{name}.b": torch.ones(3)}, file)
            self.bytes[file] = Path(file).read_bytes()
            self.rows.append(SimpleNamespace(name=name, file=file))

    def size(self, path: str) -> int:
        return len(self.bytes[path])

    def peek(self, path: str, size: int, offset: int = 0) -> bytes:
        return self.bytes[path][offset : offset + size]

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        assert self.device is not None
        self.device.on_host("read", view)
        view[:] = self.bytes[path][offset : offset + len(view)]


class Late(Future[Any]):
    """What another thread does no sooner than somebody asks for its result."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self._make = run

    def result(self, timeout: float | None = None) -> Any:
        self.exception()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self.done():
            try:
                self.set_result(self._make())
            except Exception as error:
                self.set_exception(error)
        return super().exception(timeout)


class Worker:
    """The thread that brings weights, at the pace that a test wants: at once, or late."""

    def __init__(self, late: bool) -> None:
        self._late = late

    def submit(self, run: Callable[..., Any], *args: Any) -> Future[Any]:
        future = Late(lambda: run(*args))
        if not self._late:
            future.exception()
        return future

    def shutdown(self, **_: Any) -> None:
        """Has nothing to end."""


class Run:
    """A store on a simulated GPU, and what was read there."""

    def __init__(
        self, files: Files, device: Simulated, to: str | None, late: bool = False, arena: Arena | None = None
    ) -> None:
        self.files, self.device = files, device
        files.device = device
        offload = None if to is None else {"use_stream": True, "to": to}
        groups: Any = {"unet": files.rows}
        self.store = WeightStore(files, groups, device.device, offload, on=device, arena=arena)  # type: ignore[arg-type]
        if self.store._worker is not None:
            self.store._worker.shutdown()
            self.store._worker = Worker(late)  # type: ignore[assignment]
        self.wrong: list[str] = []

    def call(self, steps: int, stop: int | None = None) -> None:
        """A call of some steps as the executor makes it; after `stop` blocks something raises."""
        blocks: list[Key] = [("unet", str(index)) for index in range(BLOCKS)]
        cursor = self.store.follow([REST, *blocks] * steps)
        try:
            for number in range(steps):
                self._step(cursor, blocks, None if stop is None else stop - number * BLOCKS)
        except KeyboardInterrupt:
            pass
        finally:
            cursor.close()

    def end(self) -> None:
        """Closes the store while the GPU may still be busy."""
        self.store.close()
        self.device.finish()

    def _step(self, cursor: Cursor, blocks: list[Key], stop: int | None) -> None:
        self._compute(cursor, REST)
        for index, key in enumerate(blocks):
            if index == stop:
                raise KeyboardInterrupt
            self._compute(cursor, key)
            cursor.leave(key)
        cursor.leave(REST)

    def _compute(self, cursor: Cursor, key: Key) -> None:
        tensors = cursor.enter(key)
        group = self.store.groups[key]
        data = self.files.bytes[group.file][group.offset :]
        wanted = [data[entry.start : entry.end] for entry in (group.entries[name] for name in tensors)]

        def see(found: list[bytes]) -> None:
            if found != wanted:
                self.wrong.append(key[1])

        self.device.compute(f"block {key[1]}", list(tensors.values()), see)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging.__init__, "__defaults__", (BUFFER,))


PLACES = pytest.mark.parametrize("to", ["host", "disk"])
#: The rest, the block that is computed with, the next, and the one before it that is on its way out.
MOST = 4 * (SIZE + 1024)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.lists(st.integers(0, 40), max_size=200),
    to=st.sampled_from(["host", "disk", None]),
    late=st.booleans(),
    steps=st.integers(1, 4),
    stop=st.one_of(st.none(), st.integers(0, 2 * BLOCKS)),
)
def test_at_every_pace_each_weight_is_there_and_no_memory_is_reused_too_early(
    files: Files, schedule: list[int], to: str | None, late: bool, steps: int, stop: int | None
) -> None:
    device = Simulated(schedule=schedule)
    run = Run(files, device, to, late)
    run.call(steps, stop)
    run.call(steps)  # as the next call of the same pipeline, also after an error
    run.end()
    assert device.races == []
    assert run.wrong == []
    if to is not None:
        assert device.peak <= MOST


@PLACES
def test_a_gpu_that_holds_no_more_than_the_blocks_in_use_suffices(files: Files, to: str) -> None:
    run = Run(files, Simulated(capacity=MOST), to)
    run.call(4)
    run.end()
    assert run.wrong == []
    with pytest.raises(OutOfMemory):
        Run(files, Simulated(capacity=MOST), None)


def test_memory_of_the_host_is_pinned_in_the_size_of_the_weights(files: Files) -> None:
    """torch's own pinned memory would be a power of two for each group."""
    device = Simulated()
    run = Run(files, device, "host")
    total = sum(group.nbytes for group in run.store.groups.values())
    assert total <= device.pinned_bytes <= total + 256 * len(run.store.groups)
    run.end()
    assert device.pinned_bytes == 0


def test_a_transfer_takes_its_time(files: Files) -> None:
    device = Simulated(bandwidth=1e6)
    run = Run(files, device, "host")
    run.call(2)
    run.end()
    brought = run.store.brought * SIZE
    assert device.default_stream().time == pytest.approx(brought / 1e6, rel=0.05)


# -- mistakes --


def no_wait(self: TransferQueue, arrived: Any) -> None:
    """What is launched next does not wait for the weights."""


def early_record(self: TransferQueue, copy: Callable[[], torch.Tensor]) -> Any:
    while self._left:
        self._left.popleft().synchronize()
    arrived = self._accelerator.event()
    arrived.record(self._stream)
    with self._accelerator.on(self._stream):
        return copy(), arrived


def early_reuse(self: TransferQueue, copy: Callable[[], torch.Tensor]) -> Any:
    arrived = self._accelerator.event()
    with self._accelerator.on(self._stream):
        flat = copy()
        arrived.record(self._stream)
    return flat, arrived


def nothing(self: Any, *_: Any) -> None:
    """Leaves out what should be done."""


def same_buffer(self: Staging) -> Any:
    if not self._buffers:
        self._buffers = [self._accelerator.pinned(self._size) for _ in range(2)]
    self._next = 1 - self._next
    return self._buffers[self._next], self._next


#: Where weights wait, what is changed, and what races with what.
MISTAKES: dict[str, tuple[str, list[tuple[type, str, Any]], set[str]]] = {
    "no wait for the arrival": ("host", [(TransferQueue, "wait", no_wait)], {"copy", "block 0"}),
    "arrival recorded before the copy": ("host", [(TransferQueue, "bring", early_record)], {"copy", "block 0"}),
    "memory reused before it was read": (
        "host",
        [(TransferQueue, "bring", early_reuse), (TransferQueue, "leaves", nothing)],
        {"another use of memory", "block 0"},
    ),
    "a buffer filled before it was copied": ("disk", [(Staging, "_free", same_buffer)], {"copy", "read"}),
    "pinned memory given back before it was copied": (
        "host",
        [(TransferQueue, "close", nothing)],
        {"copy", "pinned memory is given back"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_known_mistake_is_found(files: Files, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    to, changes, expected = MISTAKES[mistake]
    for owner, name, changed in changes:
        monkeypatch.setattr(owner, name, changed)
    device = Simulated()
    run = Run(files, device, to)
    run.call(3)
    run.call(1, stop=1)  # the next block is on its way, and nobody will ask for it
    run.end()
    assert expected in [{race.first, race.second} for race in device.races]


def test_a_mistake_gives_wrong_numbers(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only clocks tell: a weight that nobody waited for is read as poison."""
    monkeypatch.setattr(TransferQueue, "wait", no_wait)
    run = Run(files, Simulated(), "host")
    run.call(1)
    run.end()
    assert run.wrong


def test_a_host_that_runs_ahead_fills_the_gpu_where_it_does_not_wait_for_what_left(files: Files, monkeypatch) -> None:
    monkeypatch.setattr(TransferQueue, "bring", early_reuse)
    device = Simulated()
    run = Run(files, device, "host")
    run.call(4)
    run.end()
    assert device.peak > MOST
