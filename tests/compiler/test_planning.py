"""A spec's memory, before anything is built: limits that cannot be kept, and GPUs that are too small."""

from __future__ import annotations

from typing import Any

import pytest

import diffkiln
from diffkiln.compiler.check import check
from diffkiln.compiler.compile import _recorded, _rewritten, plan_memory_of
from diffkiln.compiler.planning import check_memory
from diffkiln.errors import IllegalPlan
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
GPU = {"device": "cuda", "compute_capability": "8.0", "memory_gb": 0.003, "memory_gb_per_s": 100, "h2d_gb_per_s": 10}


def spec(offload: dict[str, Any] | None = None, target: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "spec_version": 1,
        "source": {"model": "model"},
        "target": target or {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 2, "call": {"max_sequence_length": 16}},
        "runtime": {"offload": offload} if offload else {},
    }


def problems(given: dict[str, Any]) -> list[str]:
    plan = _rewritten(_recorded(check(given, base=DIGITS)))
    with pytest.raises(IllegalPlan) as caught:
        check_memory(plan)
    return [str(problem) for problem in caught.value.problems]


def test_auto_on_a_cpu_needs_a_limit() -> None:
    with pytest.raises(IllegalPlan, match=r"\$\.runtime\.offload\.max_memory: auto keeps within the memory of a GPU"):
        diffkiln.check(spec({"strategy": "auto"}), base=DIGITS)


def test_a_limit_that_no_plan_keeps() -> None:
    (told,) = problems(spec({"strategy": "auto", "max_memory": "1MB"}))
    assert told.startswith("$.runtime.offload.max_memory: found 1,000,000 bytes, required 1,7")
    assert "while transformer runs (denoise)" in told
    with pytest.raises(IllegalPlan, match="found 1,000 bytes"):
        plan_memory_of(spec(), base=DIGITS, max_memory=1000)


def test_plans_follow_the_policy_and_the_limit() -> None:
    def plan(offload: dict[str, Any] | None, limit: str | None = None) -> Any:
        (calls,) = plan_memory_of(spec(offload), base=DIGITS, max_memory=limit).values()
        return calls["call"].residency

    assert plan(None).strategy == "resident"
    assert plan({"strategy": "group"}).strategy == "group"
    auto = plan({"strategy": "auto", "max_memory": "4MB"})
    assert (auto.strategy, auto) == ("auto", plan(None, "4MB"))
    assert auto.peak <= 4_000_000


def test_a_gpu_that_is_too_small_is_named_with_what_would_fit() -> None:
    (told,) = problems(spec(target=GPU))
    assert told.startswith("$.runtime.offload: 32x32-2-steps takes ")
    assert 'Set it to {"strategy": "auto"}' in told
    check_memory(_rewritten(_recorded(check(spec({"strategy": "auto"}, GPU), base=DIGITS))))
