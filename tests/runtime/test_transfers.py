"""The way to a GPU as far as none is needed: how tensors lie there, and how far ahead of it the host may be."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.runtime.tables import Entry
from diffkiln.runtime.transfers import ALIGNMENT, TransferQueue, aligned
from tests.simulated import Simulated


def entries(*sizes: int) -> dict[str, Entry]:
    """Tensors of bytes, side by side."""
    made, end = {}, 0
    for index, size in enumerate(sizes):
        made[str(index)] = Entry(torch.uint8, (size,), end, end + size)
        end += size
    return made


# -- how tensors lie --


def test_tensors_that_lie_well_are_one_copy() -> None:
    layout = aligned(entries(ALIGNMENT, 3 * ALIGNMENT, 6))
    assert layout.copies == ((0, 0, 4 * ALIGNMENT + 6),)
    assert layout.nbytes == 4 * ALIGNMENT + 6


def test_one_of_three_elements_displaces_none_of_those_that_follow() -> None:
    layout = aligned(entries(6, ALIGNMENT, ALIGNMENT))
    assert layout.copies == ((0, 0, 6), (6, ALIGNMENT, 2 * ALIGNMENT))
    assert layout.starts == {"0": 0, "1": ALIGNMENT, "2": 2 * ALIGNMENT}


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * ALIGNMENT), max_size=12))
def test_every_tensor_is_aligned_and_has_its_own_bytes(sizes: list[int]) -> None:
    made = entries(*sizes)
    host = torch.arange(sum(sizes), dtype=torch.int64).to(torch.uint8)
    layout = aligned(made)
    assert layout.nbytes <= sum(sizes) + ALIGNMENT * len(sizes)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for source, to, size in layout.copies:
        flat[to : to + size] = host[source : source + size]
    for name, entry in made.items():
        start = layout.starts[name]
        assert start % ALIGNMENT == 0
        assert torch.equal(flat[start : start + entry.end - entry.start], host[entry.start : entry.end])


# -- how far ahead the host may be --


def bringing(lane: TransferQueue, device: Simulated, host: torch.Tensor) -> tuple[torch.Tensor, Any]:
    def copy() -> torch.Tensor:
        flat = device.empty(8)
        device.copy(flat, host)
        return flat

    return lane.bring(copy)


def test_the_host_never_has_more_groups_under_way_than_two() -> None:
    """The one that is computed with and the next: not all those that the host has launched."""
    device = Simulated()
    lane, host = TransferQueue(device), device.pinned(8)
    done: list[int] = []
    tensor, arrived = bringing(lane, device, host)
    for number in range(10):
        lane.wait(arrived)
        device.compute("a block", [tensor], lambda _, number=number: done.append(number))
        following, arrived = bringing(lane, device, host)
        lane.leaves([tensor])
        tensor = following
        lane.left()
        assert number + 1 - len(done) <= 2
    assert device.races == []


def test_a_group_waits_for_its_own_arrival_and_for_no_later_one() -> None:
    device = Simulated()
    lane, host = TransferQueue(device), device.pinned(8)
    first, arrived = bringing(lane, device, host)
    copies = device._streams[1]
    bringing(lane, device, host)
    lane.wait(arrived)
    device.compute("a block", [first], lambda _: None)
    device.default_stream().synchronize()
    assert (copies.done, copies.launched) == (1, 2)
