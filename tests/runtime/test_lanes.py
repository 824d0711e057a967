"""The way to a GPU as far as none is needed: how tensors lie there, and how far ahead of it the host may be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkiln.runtime.lanes import ALIGNMENT, Lane, aligned, copied
from diffkiln.runtime.weights import Entry

CPU = torch.device("cpu")


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


@given(st.lists(st.integers(0, 3 * ALIGNMENT), max_size=12))
def test_every_tensor_is_aligned_and_has_its_own_bytes(sizes: list[int]) -> None:
    made = entries(*sizes)
    host = torch.arange(sum(sizes), dtype=torch.int64).to(torch.uint8)
    layout = aligned(made)
    flat = copied(host, layout, CPU)
    assert flat.numel() == layout.nbytes <= sum(sizes) + ALIGNMENT * len(sizes)
    for name, entry in made.items():
        start = layout.starts[name]
        assert start % ALIGNMENT == 0
        assert torch.equal(flat[start : start + entry.end - entry.start], host[entry.start : entry.end])


# -- how far ahead the host may be --


class Stream:
    """What was launched on it, in order, and how much of it has run: nothing, until somebody waits."""

    def __init__(self) -> None:
        self.launched = self.run = 0
        self.waits: list[tuple[Stream, int]] = []

    def launch(self) -> None:
        self.launched += 1

    def wait_event(self, event: Event) -> None:
        self.waits.append(event.place)


class Event:
    place: tuple[Stream, int]

    def record(self, stream: Stream) -> None:
        self.place = stream, stream.launched

    def synchronize(self) -> None:
        stream, count = self.place
        stream.run = max(stream.run, count)


class Gpu:
    """As slow as can be: it runs only what the host waits for."""

    def __init__(self) -> None:
        self.default = self.current = Stream()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Tensor:
    """A group's memory: it is its own until what was launched when it was let go has run."""

    def __init__(self) -> None:
        self.until = 0

    def record_stream(self, stream: Stream) -> None:
        self.until = stream.launched


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.current)
    copying = copied

    def launched(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.current.launch()
        return copying(*args, **kwargs)

    monkeypatch.setattr("diffkiln.runtime.lanes.copied", launched)
    return made


def test_the_host_never_has_more_groups_under_way_than_two(gpu: Gpu) -> None:
    """The one that is computed with and the next: not all those that the host has launched."""
    lane, layout, groups = Lane(CPU), aligned(entries(8)), []
    arrived: Any = lane.bring(torch.zeros(8, dtype=torch.uint8), layout)[1]
    for _ in range(10):
        lane.wait(arrived)
        _, arrived = lane.bring(torch.zeros(8, dtype=torch.uint8), layout)  # the next one
        groups.append(Tensor())
        gpu.default.launch()  # the block's kernels
        lane.leaves(groups[-1:])  # type: ignore[arg-type]
        lane.left()
        assert sum(group.until > gpu.default.run for group in groups) <= 2


def test_a_group_waits_for_its_own_arrival_and_for_no_later_one(gpu: Gpu) -> None:
    lane, layout, host = Lane(CPU), aligned(entries(8)), torch.zeros(8, dtype=torch.uint8)
    _, first = lane.bring(host, layout)
    _, second = lane.bring(host, layout)
    for _ in range(2):  # two blocks of one group
        lane.wait(first)
    lane.wait(second)
    assert [count for _, count in gpu.default.waits] == [1, 1, 2]
