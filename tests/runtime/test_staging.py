"""Reading weights by several threads, and the two buffers on their way to a GPU."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.errors import DigestMismatch
from diffkiln.runtime.staging import Reader, Staging
from diffkiln.runtime.tables import Entry
from diffkiln.runtime.transfers import aligned
from tests.simulated import Simulated

DATA = torch.randint(0, 256, (10_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()


def read_into(_file: str, view: memoryview, offset: int) -> None:
    view[:] = DATA[offset : offset + len(view)]


@settings(deadline=None)
@given(size=st.integers(0, 9000), offset=st.integers(0, 1000), threads=st.integers(1, 8), piece=st.integers(1, 4000))
def test_a_buffer_has_the_files_bytes_however_many_threads_read(size, offset, threads, piece) -> None:
    reader = Reader(read_into, threads, piece)
    found = reader.fill("file", torch.empty(size, dtype=torch.uint8), offset)
    reader.close()
    assert found.numpy().tobytes() == DATA[offset : offset + size]


def test_large_files_are_read_by_several_threads_at_once() -> None:
    together = threading.Barrier(4, timeout=60)

    def waits(file: str, view: memoryview, offset: int) -> None:
        together.wait()
        read_into(file, view, offset)

    reader = Reader(waits, threads=4, piece=100)
    assert reader.fill("file", torch.empty(400, dtype=torch.uint8), 0).numpy().tobytes() == DATA[:400]
    reader.close()


def test_an_error_of_one_thread_is_told() -> None:
    def cut(file: str, view: memoryview, offset: int) -> None:
        if offset:
            raise DigestMismatch("cut short")
        read_into(file, view, offset)

    reader = Reader(cut, threads=4, piece=100)
    with pytest.raises(DigestMismatch):
        reader.fill("file", torch.empty(400, dtype=torch.uint8), 0)
    reader.close()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 700), max_size=10), buffer=st.integers(16, 900))
def test_what_goes_through_two_buffers_arrives_whole(sizes: list[int], buffer: int) -> None:
    entries, end = {}, 0
    for index, size in enumerate(sizes):
        entries[str(index)] = Entry(torch.uint8, (size,), end, end + size)
        end += size
    device, layout = Simulated(), aligned(entries)
    staging = Staging(device, Reader(read_into), buffer)
    flat = device.empty(layout.nbytes)
    staging.bring("file", 3, end, layout, flat)
    staging.close()
    assert device.races == []
    for name, entry in entries.items():
        start = layout.starts[name]
        size = entry.end - entry.start
        assert flat[start : start + size].numpy().tobytes() == DATA[3 + entry.start : 3 + entry.end]
    assert device.pinned_bytes == 0
