"""The TF32 policy holds while a pipeline runs, and the process's own settings come back."""

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan
from diffkiln.runtime.precision import float32_precision
from tests.conftest import DIGITS

HOMES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


@pytest.mark.parametrize(("policy", "word"), [(True, "tf32"), (False, "ieee")])
def test_it_holds_while_it_lasts_and_no_longer(policy, word):
    before = [home.fp32_precision for home in HOMES]
    with float32_precision(policy):
        assert [home.fp32_precision for home in HOMES] == [word, word]
    assert [home.fp32_precision for home in HOMES] == before


def test_it_ends_with_an_error_too():
    before = [home.fp32_precision for home in HOMES]
    with pytest.raises(ZeroDivisionError), float32_precision(True):
        raise ZeroDivisionError
    assert [home.fp32_precision for home in HOMES] == before


def test_none_changes_nothing():
    before = [home.fp32_precision for home in HOMES]
    with float32_precision(None):
        assert [home.fp32_precision for home in HOMES] == before


def test_a_pipeline_runs_under_its_policy(digits_bundle):
    seen = []
    with diffkiln.load(digits_bundle) as pipe:
        pipe.executor.tf32 = True
        pipe("seven", callback_on_step_end=lambda *_: seen.append(HOMES[0].fp32_precision) or {})
    assert set(seen) == {"tf32"}


def test_a_cpu_has_none():
    spec = {
        "spec_version": 1,
        "source": {"model": "model"},
        "target": {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 8},
        "runtime": {"tf32": True},
    }
    with pytest.raises(IllegalPlan, match=r"\$\.runtime\.tf32: a CPU has no TF32"):
        diffkiln.check(spec, base=DIGITS)
    assert diffkiln.check(spec | {"target": {"device": "cuda", "gpu": "nvidia-l4"}}, base=DIGITS).spec.runtime.tf32
