"""The one module that names torch.cuda, as far as no GPU is needed."""

from __future__ import annotations

import ast
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffkiln.runtime
from diffkiln.bundle import open_bundle
from diffkiln.errors import VerifyError
from diffkiln.runtime import accelerator as module
from diffkiln.runtime import arrival, loading, opening, targets
from diffkiln.runtime.accelerator import Cuda, accelerator, indexed
from diffkiln.runtime.engines import check_inputs
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.weights import WeightStore
from tests.simulated import Simulated

RUNTIME = Path(diffkiln.runtime.__file__).parent


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def is_torch_cuda(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr != "cuda":
        return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda")
    return isinstance(node.value, ast.Name) and node.value.id == "torch"


def test_nothing_else_in_the_runtime_names_torch_cuda() -> None:
    assert [file.name for file in sorted(RUNTIME.rglob("*.py")) if any(map(is_torch_cuda, nodes(file)))] == [
        "accelerator.py"
    ]


def test_a_cpu_has_none() -> None:
    assert accelerator(torch.device("cpu")) is None


class Gpus:
    """torch.cuda of a machine with two GPUs, of which this thread's current one can be changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


def test_a_gpu_without_a_number_is_the_current_one_for_good(gpus: Gpus) -> None:
    gpus.current = 1
    place = indexed(torch.device("cuda"))
    there = accelerator(torch.device("cuda"))
    gpus.current = 0
    assert place == torch.device("cuda:1")
    assert there is not None
    assert there.device == torch.device("cuda:1")
    assert indexed(torch.device("cuda:0")) == torch.device("cuda:0")
    assert indexed(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_a_bundle_for_a_gpu_is_placed_on_the_current_one(gpus: Gpus, monkeypatch, device) -> None:
    monkeypatch.setattr(targets, "devices_of", lambda manifest: {"cuda"})
    gpus.current = 1
    manifest: Any = SimpleNamespace()
    assert targets.device_for(manifest, device) == torch.device("cuda:1")


def test_an_engine_is_given_no_tensor_of_another_gpu() -> None:
    layout = SimpleNamespace(dtype="float32", shape=(1,), stride=(1,))
    tensor: Any = SimpleNamespace(dtype=torch.float32, shape=(1,), stride=lambda: (1,), device=torch.device("cuda:0"))
    check_inputs([tensor], [layout], torch.device("cuda:0"), "the engine")
    with pytest.raises(VerifyError, match="it is on cuda:0, the engine on cuda:1"):
        check_inputs([tensor], [layout], torch.device("cuda:1"), "the engine")


class Entered(Simulated):
    """Notes how often it was made the current device."""

    entered = 0

    def active(self) -> Any:
        self.entered += 1
        return super().active()


@pytest.mark.parametrize("to", ["host", "disk", None])
def test_weights_are_brought_with_their_gpu_as_the_threads_current_one(digits_bundle, to) -> None:
    """The thread that brings them ahead has a current GPU of its own, the first, unless it is told."""
    with open_bundle(digits_bundle) as bundle, bundle.verify() as verified:
        device = Entered()
        offload = None if to is None else {"use_stream": True, "to": to}
        store = WeightStore(verified, verified.manifest.weights, device.device, offload, on=device)
        for key in store.groups:
            store.get(key)
        assert device.entered >= len(store.groups)
        store.close()


# -- pinned memory --


class Runtime:
    """CUDA's runtime, which pins memory or does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self._code = code
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(Cuda, "active", lambda _: module.nullcontext())

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self._code == 0:
            self.pinned[address] = size
        return self._code

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


def test_exactly_what_is_asked_is_pinned_and_given_back_with_the_tensor(monkeypatch) -> None:
    runtime = Runtime(monkeypatch)
    tensor = Cuda(torch.device("cuda:0")).pinned(5000)
    view = tensor[100:200]
    assert runtime.pinned == {tensor.data_ptr(): 5000}
    del tensor
    gc.collect()
    assert runtime.pinned, "a view of it is still there"
    del view
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_that_is_told(monkeypatch, caplog) -> None:
    runtime = Runtime(monkeypatch, code=2)
    with caplog.at_level(logging.WARNING):
        tensor = Cuda(torch.device("cuda:0")).pinned(5000)
    assert tensor.numel() == 5000
    assert runtime.pinned == {}
    assert "cannot be pinned (CUDA error 2)" in caplog.text
    assert "ulimit -l" in caplog.text


# -- memory of the self-test --


@pytest.mark.parametrize("checked", [True, False])
def test_what_comparisons_took_is_given_back_before_weights_come(digits_bundle, monkeypatch, checked: bool) -> None:
    released: list[str] = []
    there = SimpleNamespace(release=lambda: released.append("given back"))
    monkeypatch.setattr(opening, "accelerator", lambda place: there)
    monkeypatch.setattr(
        arrival, "WeightStore", lambda *given, **more: released.append("weights") or WeightStore(*given, **more)
    )
    with loading.load(digits_bundle, device="cpu", check_engines=checked) as pipe:
        assert isinstance(pipe.executor, Executor)
    assert released == (["given back", "weights"] if checked else ["weights"])
