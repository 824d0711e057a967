"""CUDA graphs on a GPU: they draw what is drawn without them, bit for bit, replayed and with engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import CallError
from diffkiln.exporters.cuda import cuda_problems
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]
DENOISERS = {"flux": "transformer", "sdxl": "unet"}
REQUESTS = [("a red fox", 1), ("two blue birds on a wire", 2), ("a red fox", 1)]


def made(family: str, root: Path, unit: str | None, passes: list[dict[str, Any]]) -> dict[str, Any]:
    spec = spec_of(family, root)
    spec["source"]["dtype"] = "bfloat16"
    major, minor = torch.cuda.get_device_capability()
    numbers = {"compute_capability": f"{major}.{minor}", "memory_gb": 16, "h2d_gb_per_s": 20}
    runtime = {"cuda_graphs": unit} if unit else {}
    return spec | {"target": {"device": "cuda", **numbers}, "passes": passes, "runtime": runtime}


def drawn(path: Path) -> list[torch.Tensor]:
    with diffkiln.load(path) as pipe:
        return [
            pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt").images
            for prompt, seed in REQUESTS
        ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", DENOISERS)
def test_graphs_draw_what_is_drawn_without_them(family: str, compiled: bool, families: Path, tmp_path: Path) -> None:
    if compiled and (missing := list(cuda_problems())):
        pytest.skip(f"engines cannot be built here: {missing[0]}")
    passes = [
        {"name": "compile", "component": DENOISERS[family]},
        {"name": "compile", "component": "scheduler"},
    ]
    found = {}
    for unit in (None, "step", "program"):
        spec = made(family, families, unit, passes if compiled else [])
        found[unit] = drawn(diffkiln.compile(spec, tmp_path / str(unit)).path)
    for unit in ("step", "program"):
        for got, want in zip(found[unit], found[None], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("family", DENOISERS)
def test_graphs_draw_the_same_with_weights_that_stream(family: str, families: Path, tmp_path: Path) -> None:
    found = {}
    for unit in (None, "step", "program"):
        spec = made(family, families, unit, [])
        spec["runtime"] |= {"offload": {"strategy": "stream"}}
        found[unit] = drawn(diffkiln.compile(spec, tmp_path / str(unit)).path)
    resident = drawn(diffkiln.compile(made(family, families, None, []), tmp_path / "resident").path)
    for draws in found.values():
        for got, want in zip(draws, resident, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_callback_is_called_between_the_graphs_of_steps(families: Path, tmp_path: Path) -> None:
    built = diffkiln.compile(made("flux", families, "step", []), tmp_path / "bundle")
    seen: list[torch.Tensor] = []
    with diffkiln.load(built.path) as pipe:
        for seed in (1, 1):
            pipe(
                "a red fox",
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=lambda _, step, timestep, tensors: seen.append(tensors["latents"].cpu()) or {},
            )
    half = len(seen) // 2
    assert half > 1
    for first, second in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_callback_within_the_graph_of_all_steps_is_refused(families: Path, tmp_path: Path) -> None:
    built = diffkiln.compile(made("flux", families, "program", []), tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe, pytest.raises(CallError, match="one CUDA graph"):
        pipe("a red fox", callback_on_step_end=lambda *_: {})


def test_weights_have_one_place_and_graphs_share_their_memory(families: Path, tmp_path: Path) -> None:
    built = diffkiln.compile(made("flux", families, "step", []), tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe:
        for seed in range(3):
            pipe("a red fox", generator=torch.Generator().manual_seed(seed))
            torch.cuda.synchronize()
            if seed == 0:
                first = torch.cuda.memory_allocated()
        assert torch.cuda.memory_allocated() == first
