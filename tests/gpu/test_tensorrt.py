"""Engines of TensorRT on a GPU: built for the one that is here, and compared with the replay of their regions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from diffkiln.bundle.state import state_dir
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.tensorrt.check import Tensorrt, library_for
from diffkiln.program import Program
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.tensorrt.engine import TensorrtEngine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec.targets import Target
from tests.exporters.regions import (
    attention,
    bfloat16_block,
    block,
    convolution,
    float16_block,
    holding,
    interpreted,
    tensors,
)

_FOUND = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec(library_for(_FOUND).module) is None, reason="the library for this GPU is not installed"
    ),
]
GPU = torch.device("cuda")


@pytest.fixture
def here() -> Target:
    """This machine's GPU as a target."""
    return Target("here", "cuda", compute_capability=f"{_FOUND[0]}.{_FOUND[1]}", memory_bytes=8 * 10**9)


@pytest.mark.parametrize("make", [block, float16_block, bfloat16_block, convolution])
def test_gives_what_the_region_gives(make: Callable[[], Program], here: Target, tmp_path) -> None:
    region = make()
    artefact = Tensorrt().export(Lowering(region, here), EngineCache(tmp_path))
    run = TensorrtEngine(artefact.directory, artefact.inputs, GPU)
    self_test(run, region, {"gate": tensors(block())[-1].to(artefact_dtype(region))}, GPU, "the engine")


def artefact_dtype(region: Program) -> torch.dtype:
    return getattr(torch, region.inputs[0].type.dtype)


def test_weights_are_looked_at_in_every_call_and_calls_follow_torch_s_stream(here: Target, tmp_path) -> None:
    region = block()
    artefact = Tensorrt().export(Lowering(region, here), EngineCache(tmp_path))
    run = TensorrtEngine(artefact.directory, artefact.inputs, GPU)
    for seed in (1, 2, 1):
        flat = [tensor.to(GPU) for tensor in tensors(region, seed)]
        found = run([flat[0] * 1.0, *flat[1:]])[0] + 0.0
        torch.testing.assert_close(found.cpu(), interpreted(region, tensors(region, seed))[0], rtol=1e-3, atol=1e-3)


def test_every_size_of_a_range(here: Target, tmp_path) -> None:
    (family,) = families([attention(tokens) for tokens in (16, 24, 40)])
    artefact = Tensorrt().export(Lowering(family.members[0], here, family=family), EngineCache(tmp_path))
    run = TensorrtEngine(artefact.directory, artefact.inputs, GPU)
    for member in family.members:
        found = run([tensor.to(GPU) for tensor in tensors(member)])
        torch.testing.assert_close(found[0].cpu(), interpreted(member, tensors(member))[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", [None, 0, 20_000])
def test_engine_that_holds_its_weights_within_a_budget(budget: int | None, here: Target, tmp_path) -> None:
    region = block()
    options = {} if budget is None else {"weight_budget": budget}
    artefact = Tensorrt().export(holding(region, target=here, **options), EngineCache(tmp_path))
    run = TensorrtEngine(artefact.directory, artefact.inputs, GPU)
    assert run.holds_weights
    flat = tensors(region)
    nothing = [torch.empty(0, device=GPU)] * len(region.weights)
    found = run([flat[0].to(GPU), *nothing, flat[-1].to(GPU)])
    torch.testing.assert_close(found[0].cpu(), interpreted(region, flat)[0], rtol=1e-3, atol=1e-3)


def test_what_was_compiled_for_this_gpu_is_kept(here: Target, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    region = convolution()
    artefact = Tensorrt().export(Lowering(region, here), EngineCache(tmp_path / "cache"))
    flat = [tensor.to(GPU) for tensor in tensors(region)]
    TensorrtEngine(artefact.directory, artefact.inputs, GPU)(flat)
    kept = list(state_dir("kernels").glob("*.cache"))
    assert len(kept) == (1 if library_for(_FOUND).portable else 0)
