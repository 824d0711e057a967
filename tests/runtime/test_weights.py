"""The weight store: what is in memory, when, and what becomes of errors."""

from __future__ import annotations

import contextlib
import struct
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.bundle import open_bundle
from diffkiln.bundle.layout import REST, UNUSED
from diffkiln.errors import DiffkilnError, IntegrityError, ManifestInvalid
from diffkiln.runtime import weights
from diffkiln.runtime.tables import read_header
from diffkiln.runtime.weights import WeightStore

CPU = torch.device("cpu")
GROUP = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "use_stream": True}


@pytest.fixture
def verified(digits_bundle):
    with open_bundle(digits_bundle) as bundle, bundle.verify() as held:
        yield held


@pytest.fixture
def store(verified):
    made = WeightStore(verified, verified.manifest.weights, CPU, GROUP)
    yield made
    made.close()


def blocks(store):
    return [key for key in store.groups if key[0] == "transformer" and key[1] != REST]


def test_resident_weights_are_all_there_from_the_start(verified):
    store = WeightStore(verified, verified.manifest.weights, CPU, None)
    assert store.groups_now == len(store.groups)
    key = blocks(store)[0]
    store.drop(key)
    assert store.get(key)
    assert store.groups_now == len(store.groups)
    store.close()


def test_resident_weights_are_hashed_as_they_are_read_and_are_those_of_the_file(digits_bundle, monkeypatch):
    import safetensors.torch

    monkeypatch.setattr(weights, "_PIECE", 1000)
    for roles in ((), None):  # hashed on the way, and before
        with open_bundle(digits_bundle) as bundle, bundle.verify(roles=roles) as verified:
            store = WeightStore(verified, verified.manifest.weights, CPU, None)
            for key, group in store.groups.items():
                assert verified.is_hashed(group.file) or not group.nbytes
                saved = safetensors.torch.load_file(verified.path / group.file)
                assert all(torch.equal(store.get(key)[name], tensor) for name, tensor in saved.items())
            store.close()


def test_weights_that_no_program_reads_stay_on_disk(verified, store):
    assert any(row.name == UNUSED for rows in verified.manifest.weights.values() for row in rows)
    assert not any(name == UNUSED for _, name in store.groups)


def test_tensors_are_those_of_the_file(verified, store):
    import safetensors.torch

    key = blocks(store)[0]
    file = verified.path / store.groups[key].file
    for name, tensor in safetensors.torch.load_file(file).items():
        assert torch.equal(store.get(key)[name], tensor)
        assert torch.equal(store.peek("transformer", name), tensor)
        assert store.key_of("transformer", name) == key


def test_a_run_holds_the_group_in_use_and_the_next(store):
    order = blocks(store) * 3
    cursor = store.follow(order)
    for key in order:
        assert set(cursor.enter(key)) == set(store.groups[key].entries)
        assert store.held() <= {key, *order}
        assert store.groups_now <= 2
        cursor.leave(key)
    cursor.close()
    assert (store.groups_now, store.bytes_now, store.held()) == (0, 0, set())
    assert 1 <= store.groups_peak <= 2


def test_the_next_group_comes_in_on_a_thread_of_its_own(store, monkeypatch):
    threads = []
    read = store._read

    def watched(group, buffer):
        threads.append(threading.current_thread().name)
        return read(group, buffer)

    monkeypatch.setattr(store, "_read", watched)
    order = blocks(store)
    cursor = store.follow(order)
    for key in order:
        cursor.enter(key)
        cursor.leave(key)
    cursor.close()
    assert threads[0] == "MainThread"
    assert all(name.startswith("diffkiln-weights") for name in threads[1:])
    assert len(threads) == len(order)


def test_without_a_stream_everything_is_read_when_it_is_needed(verified):
    store = WeightStore(verified, verified.manifest.weights, CPU, GROUP | {"use_stream": False})
    before = threading.active_count()
    cursor = store.follow(blocks(store))
    for key in blocks(store):
        cursor.enter(key)
        assert store.groups_now == 1
        cursor.leave(key)
    cursor.close()
    assert threading.active_count() == before
    store.close()


def test_a_read_that_fails_ahead_of_its_time_is_told_when_the_group_is_used(store, monkeypatch):
    order = blocks(store)
    read = store._read

    def failing(group, buffer):
        if group.key == order[1]:
            raise IntegrityError("the file was cut")
        return read(group, buffer)

    monkeypatch.setattr(store, "_read", failing)
    cursor = store.follow(order)
    cursor.enter(order[0])
    with pytest.raises(IntegrityError, match="cut"):
        cursor.enter(order[1])
    cursor.close()
    assert (store.groups_now, store.bytes_now, store.held()) == (0, 0, set())


def test_unknown_weight_is_an_integrity_error(store):
    with pytest.raises(IntegrityError, match="holds no weight 'nothing'"):
        store.key_of("transformer", "nothing")


class Bytes:
    """As much of a verified bundle as `read_header` asks for."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size(self, _path: str) -> int:
        return len(self.data)

    def peek(self, _path: str, size: int, offset: int = 0) -> bytes:
        return self.data[offset : offset + size]


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        '{"x": 1}',
        '{"x": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4.0]}}',
        '{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [4611686018427387904, 4, 0], "data_offsets": [0, 0]}}',
        '{"x": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}, '
        '"y": {"dtype": "U8", "shape": [5], "data_offsets": [3, 8]}}',
        "[" * 50_000,
    ],
)
def test_broken_headers_are_refused(header):
    data = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
    with pytest.raises(ManifestInvalid):
        read_header(Bytes(data), "weights/x.safetensors")


def test_header_longer_than_the_file_is_refused():
    with pytest.raises(ManifestInvalid):
        read_header(Bytes(struct.pack("<Q", 2**60)), "weights/x.safetensors")
    with pytest.raises(ManifestInvalid):
        read_header(Bytes(b"\0"), "weights/x.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_only_our_own_errors_escape(data):
    with contextlib.suppress(DiffkilnError):
        read_header(Bytes(struct.pack("<Q", max(len(data) - 4, 0)) + data), "weights/x.safetensors")
