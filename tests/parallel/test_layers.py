"""A bundle whose layers two processes hold: its memory, and what it refuses. The processes are threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.compile import plan_memory_of
from diffkiln.errors import CallError
from diffkiln.program import Mesh
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.processes import Group
from diffkiln.runtime.processes.threads import in_threads
from tests.parallel.specs import shared
from tests.passes.test_cache_schedule import draw, eager
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
TWO = {"layers": 2}


def in_two(bundle: Path, use: Any, **options: Any) -> list[Any]:
    """What a function gives for the pipeline of each process."""

    def run(group: Group) -> Any:
        with open_bundle(bundle) as opened:
            verified = opened.verify(roles={"program", "config"})
        loaded = load_verified(verified, None, torch.device("cpu"), LoadOptions(group=group, **options))
        with loaded as pipe:
            return use(pipe)

    return in_threads(Mesh(TWO), run)


def test_weights_stream_within_a_limit_and_adapters_are_refused(families, tmp_path):
    made = shared(families, "flux", TWO)
    built = diffkiln.compile(made, tmp_path / "bundle")
    (plan,) = (calls["call"] for calls in diffkiln.plan_memory(built.path).values())
    (checked,) = (calls["call"] for calls in plan_memory_of(made).values())
    assert 0 <= plan.residency.peak - checked.residency.peak < 1000  # the header of the file of constants
    wanted = draw(eager(made), made)

    def use(pipe: Any) -> tuple[torch.Tensor, int, str]:
        found = draw(pipe, made)
        with pytest.raises(CallError) as caught:
            pipe.load_lora(tmp_path / "style.safetensors")
        return found, pipe.executor.store.bytes_peak, str(caught.value)

    limit = plan.residency.peak * 3 // 4
    for found, peak, reason in in_two(built.path, use, max_memory=limit):
        assert float((found - wanted).abs().max()) <= 1e-5
        assert 0 < peak < limit
        assert "each process of this bundle holds weights of a range of layers" in reason
