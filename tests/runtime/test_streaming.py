"""Weights through slots on a simulated GPU: at every pace, at the same addresses, and without an allocation.

Each known mistake is made on purpose as well, and must be found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.errors import IntegrityError, InternalFault
from diffkiln.program.moments import Key, Moment
from diffkiln.program.streaming import Arena, Slot, arranged, brought
from diffkiln.runtime.streaming import SlotCursor, Slots
from diffkiln.runtime.transfers import TransferQueue
from tests.runtime.test_happens_before import BLOCKS, REST, SIZE, Files, Run, nothing, small_buffers  # noqa: F401
from tests.simulated import OutOfMemory, Simulated

SPAN = SIZE + 256  # a slot: one large tensor, and one of three numbers behind it
BLOCK: list[Key] = [("unet", str(index)) for index in range(BLOCKS)]


def step(blocks: int = BLOCKS) -> list[Moment]:
    return [
        Moment("denoise", "unet", REST, (REST,), 0),
        *(Moment("denoise", "unet", key, (REST, key), 0) for key in BLOCK[:blocks]),
        Moment("denoise", "", None, (), 0),
    ]


def arena(steps: int = 4, room: int | None = None) -> Arena:
    found = arranged([step() * steps], dict.fromkeys([REST, *BLOCK], SPAN), room)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("weights"))


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.lists(st.integers(0, 40), max_size=200),
    to=st.sampled_from(["host", "disk"]),
    late=st.booleans(),
    steps=st.integers(1, 4),
    stop=st.one_of(st.none(), st.integers(0, 2 * BLOCKS)),
    room=st.integers(4, 6),
)
def test_at_every_pace_each_weight_is_there_and_no_slot_is_filled_too_early(
    files: Files, schedule: list[int], to: str, late: bool, steps: int, stop: int | None, room: int
) -> None:
    device = Simulated(schedule=schedule)
    run = Run(files, device, to, late, arena(room=room * SPAN))
    run.call(steps, stop)
    run.call(steps)  # as the next call of the same pipeline, also after an error
    run.end()
    assert (device.races, run.wrong) == ([], [])


def test_three_hundred_steps_allocate_nothing_and_change_no_address(files: Files) -> None:
    device = Simulated()
    run = Run(files, device, "host", arena=arena())
    addresses: dict[str, set[int]] = {}

    def seen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            addresses.setdefault(name, set()).add(tensor.data_ptr())
        return tensors

    get = run.store.get
    run.store.get = lambda key: seen(get(key))  # type: ignore[method-assign]
    before = device.allocations, device.taken, device.pinned_bytes
    run.call(300)
    assert (device.allocations, device.taken, device.pinned_bytes) == before
    assert len(addresses) == 2 * (1 + BLOCKS)
    assert {len(known) for known in addresses.values()} == {1}
    assert run.store.bytes_peak == run.store.bytes_now == arena().nbytes
    run.end()
    assert (device.races, run.wrong) == ([], [])


def test_a_gpu_with_room_for_the_slots_alone_suffices(files: Files) -> None:
    run = Run(files, Simulated(capacity=arena().nbytes), "host", arena=arena())
    run.call(4)
    run.end()
    assert run.wrong == []
    with pytest.raises(OutOfMemory):
        Run(files, Simulated(capacity=arena().nbytes - 1), "host", arena=arena())


@pytest.mark.parametrize("room", [4, 5, 6])
def test_a_call_brings_in_what_the_plan_says(files: Files, room: int) -> None:
    slots = arena(room=room * SPAN)
    run = Run(files, Simulated(), "host", arena=slots)
    run.call(4)
    before = run.store.bytes_brought
    run.call(4)
    assert run.store.bytes_brought - before == brought(slots, step() * 4)
    run.end()


def test_a_copy_takes_the_time_of_its_bytes_and_there_is_one_for_each_group(files: Files) -> None:
    device = Simulated(bandwidth=1e6)
    run = Run(files, device, "host", arena=arena())
    run.call(3)
    run.end()
    assert device.default_stream().time == pytest.approx(run.store.brought * SIZE / 1e6, rel=0.05)
    assert device._streams[1].launched == run.store.brought


def test_the_host_never_waits(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Simulated()
    run = Run(files, device, "host", arena=arena())
    run.call(4)
    assert device._streams[1].done == device.default_stream().done == 0
    run.end()
    assert run.wrong == []


def test_what_is_next_comes_while_what_is_in_use_is_computed_with(files: Files) -> None:
    """Also across the border of a step: the first block comes during the last one."""
    run = Run(files, Simulated(), "host", arena=arena())
    cursor = run.store.follow([REST, *BLOCK] * 2)
    for key in (REST, *BLOCK):
        cursor.enter(key)
        if key != REST:
            following = BLOCK[(BLOCK.index(key) + 1) % BLOCKS]
            assert following in run.store.held()
            cursor.leave(key)
    run.end()


# -- mistakes --


def early_record(self: TransferQueue, copy: Callable[[], object], free: Any) -> Any:
    arrived = self._accelerator.event()
    for event in free:
        self._stream.wait_event(event)
    with self._accelerator.on(self._stream):
        arrived.record(self._stream)
        copy()
    return arrived


def no_uses(self: Slots, key: Key) -> list[Any]:
    """A slot is filled without a wait for what was computed with its content."""
    return []


#: What is changed, and what races with what.
MISTAKES: dict[str, tuple[type, str, Any, set[str]]] = {
    "no wait for the arrival": (TransferQueue, "wait", nothing, {"copy", "block 0"}),
    "arrival recorded before the copy": (TransferQueue, "fill", early_record, {"copy", "block 0"}),
    "a slot filled before it was read": (Slots, "last_uses", no_uses, {"copy", "block 0"}),
    "pinned memory given back before it was copied": (
        TransferQueue,
        "close",
        nothing,
        {"copy", "pinned memory is given back"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_known_mistake_is_found(files: Files, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, changed, expected = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, changed)
    device = Simulated()
    run = Run(files, device, "host", arena=arena())
    run.call(3)
    run.call(1, stop=1)  # the next block is on its way, and nobody will ask for it
    run.end()
    assert expected in [{race.first, race.second} for race in device.races]


def test_slots_that_groups_in_use_share_are_refused_before_they_are_filled() -> None:
    """As no plan makes them."""
    slots = Arena({REST: Slot(0, 256), BLOCK[0]: Slot(0, 256)})
    cursor = SlotCursor(Here(), [REST, BLOCK[0]], slots)
    cursor.enter(REST)
    with pytest.raises(InternalFault, match="would displace"):
        cursor.enter(BLOCK[0])


class Here:
    """A store whose groups are all there."""

    def get(self, key: Key) -> dict[str, torch.Tensor]:
        return {}

    def prefetch(self, key: Key) -> None:
        """Has nothing to bring."""

    def held(self) -> set[Key]:
        return set()

    def used(self, key: Key) -> None:
        """Has nothing to note."""


# -- on a CPU --


def on_cpu(files: Files) -> Any:
    from diffkiln.runtime.weights import WeightStore

    files.device = Simulated()
    groups: Any = {"unet": files.rows}
    return WeightStore(files, groups, torch.device("cpu"), {"strategy": "stream"}, arena=arena())  # type: ignore[arg-type]


def test_on_a_cpu_a_slot_is_plain_memory(files: Files) -> None:
    store = on_cpu(files)
    order = [REST, *BLOCK] * 3
    cursor = store.follow(order)
    addresses: dict[str, int] = {}
    for key in order:
        for name, tensor in cursor.enter(key).items():
            index = 0.0 if key == REST else float(BLOCK.index(key) + 1)
            assert tensor.eq(index if name.endswith(".w") else 1.0).all()
            assert addresses.setdefault(name, tensor.data_ptr()) == tensor.data_ptr()
        if key != REST:
            cursor.leave(key)
    cursor.close()
    assert store.bytes_now == store.bytes_peak == arena().nbytes
    store.close()


def test_a_read_that_failed_is_tried_again_when_the_group_is_used_next(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_cpu(files)
    read = store._read
    fails = True

    def failing(group: Any, buffer: torch.Tensor) -> torch.Tensor:
        if group.key == BLOCK[1] and fails:
            raise IntegrityError("the file was cut")
        return read(group, buffer)

    monkeypatch.setattr(store, "_read", failing)
    cursor = store.follow([REST, *BLOCK])
    for key in (REST, BLOCK[0]):
        cursor.enter(key)
    cursor.leave(BLOCK[0])
    with pytest.raises(IntegrityError, match="cut"):
        cursor.enter(BLOCK[1])
    cursor.close()
    fails = False
    cursor = store.follow([REST, *BLOCK])
    for key in (REST, *BLOCK):
        assert cursor.enter(key)
        if key != REST:
            cursor.leave(key)
    cursor.close()
    store.close()


def test_the_slots_are_there_again_after_a_fork(files: Files) -> None:
    store = on_cpu(files)
    store.get(REST)
    store.renew()
    assert (store.bytes_now, store.groups_now, store.held()) == (arena().nbytes, 0, set())
    assert store.get(REST)
    store.close()
