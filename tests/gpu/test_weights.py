"""Weights on a GPU: streamed, only the group in use and the next are there, and each tensor has its own bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.bundle.layout import REST
from diffkiln.program.moments import Moment
from diffkiln.program.streaming import arranged
from diffkiln.runtime.transfers import ALIGNMENT
from diffkiln.runtime.weights import Key, WeightStore
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
#: Clock cycles that a block's stand-in takes: far more than launching it.
SLOWLY = 20_000_000


@pytest.fixture(scope="module")
def verified(families, tmp_path_factory) -> Iterator:
    built = diffkiln.compile(spec_of("flux", families), tmp_path_factory.mktemp("weights") / "bundle")
    with open_bundle(built.path) as bundle, bundle.verify() as held:
        yield held


def opened(verified, device: torch.device, to: str | None) -> WeightStore:
    return WeightStore(verified, verified.manifest.weights, device, {"use_stream": True, "to": to} if to else None)


@pytest.mark.parametrize("to", [None, "host", "disk"])
def test_every_weight_has_its_bytes_and_is_aligned(verified, to: str | None) -> None:
    here, there = opened(verified, CPU, None), opened(verified, GPU, to)
    for key in here.groups:
        for name, tensor in there.get(key).items():
            assert tensor.data_ptr() % ALIGNMENT == 0
            assert torch.equal(tensor.cpu(), here.get(key)[name])
    for store in (here, there):
        store.close()


@pytest.mark.parametrize("to", ["host", "disk"])
def test_a_host_that_runs_ahead_does_not_fill_the_gpu(verified, to: str) -> None:
    store = opened(verified, GPU, to)
    blocks: list[Key] = [key for key in store.groups if key[0] == "transformer"]
    order = blocks * (30 // len(blocks) + 1)
    largest = max(store.groups[key].layout.nbytes for key in blocks)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cursor = store.follow(order)
    for key in order:
        tensors = cursor.enter(key)
        torch.cuda._sleep(SLOWLY)
        del tensors
        cursor.leave(key)
    cursor.close()
    assert torch.cuda.max_memory_allocated() - before <= 3 * (largest + ALIGNMENT * 8)
    torch.cuda.synchronize()
    store.close()


def test_what_is_computed_ahead_reads_the_right_weights(verified) -> None:
    store = opened(verified, GPU, "host")
    blocks: list[Key] = [key for key in store.groups if key[0] == "transformer"]
    found: list[tuple[Key, torch.Tensor]] = []
    order = blocks * 5
    cursor = store.follow(order)
    for key in order:
        tensors = cursor.enter(key)
        torch.cuda._sleep(SLOWLY // 10)
        found.append((key, torch.stack([tensor.double().sum() for tensor in tensors.values()])))
        del tensors
        cursor.leave(key)
    cursor.close()
    wanted = {key: next(value for other, value in found if other == key).cpu() for key in blocks}
    plain = opened(verified, CPU, None)
    for key in blocks:
        sums = torch.stack([tensor.double().sum() for tensor in plain.get(key).values()])
        torch.testing.assert_close(wanted[key], sums)
    for key, sums in found:
        assert torch.equal(sums.cpu(), wanted[key])
    for each in (plain, store):
        each.close()


def test_weights_that_stream_through_slots_keep_their_addresses_and_allocate_nothing(verified) -> None:
    here = opened(verified, CPU, None)
    blocks = [key for key in here.groups if key[0] == "transformer" and key[1] != REST]
    listed = [Moment("denoise", "transformer", key, (key,), 0) for key in blocks * 5]
    arena = arranged([listed], {key: group.layout.nbytes for key, group in here.groups.items()})
    offload = {"strategy": "stream", "to": "host"}
    there = WeightStore(verified, verified.manifest.weights, GPU, offload, arena=arena)
    before = torch.cuda.memory_allocated()
    found: list[tuple[Key, torch.Tensor]] = []
    addresses: dict[str, int] = {}
    cursor = there.follow(blocks * 5)
    for key in blocks * 5:
        tensors = cursor.enter(key)
        assert torch.cuda.memory_allocated() - before <= 8 * 512 * len(found)  # the sums below, and nothing else
        torch.cuda._sleep(SLOWLY // 10)
        assert all(
            addresses.setdefault(name, tensor.data_ptr()) == tensor.data_ptr() for name, tensor in tensors.items()
        )
        found.append((key, torch.stack([tensor.double().sum() for tensor in tensors.values()])))
        cursor.leave(key)
    cursor.close()
    for key, sums in found:
        assert sums.tolist() == pytest.approx([tensor.double().sum().item() for tensor in here.get(key).values()])
    for store in (here, there):
        store.close()
