"""The process that measures the working memory of a bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffkiln.bundle import open_bundle
from diffkiln.runtime import working
from diffkiln.runtime.executor import Executor
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def test_a_bundle_is_called_and_measured(digits_bundle) -> None:
    found = working.answer(str(digits_bundle))
    assert found["threads"] == torch.get_num_threads()
    assert found["bytes"] % working.NOTCH == 0
    with open_bundle(digits_bundle) as opened:
        targets: Any = opened.manifest.runtime["targets"]
    assert found["target"] in targets


def test_too_much_work_is_a_reason(digits_bundle, monkeypatch) -> None:
    monkeypatch.setattr(working, "MOST_WORK", 1.0)
    assert "TFLOP" in working.answer(str(digits_bundle))["reason"]


def test_what_is_no_bundle_is_a_reason(tmp_path) -> None:
    assert "manifest.json" in working.answer(str(tmp_path))["reason"]


def test_a_kernel_that_does_not_tell_is_a_reason(digits_bundle, monkeypatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/proc/self/clear_refs")

    monkeypatch.setattr(working, "forget_highest", refuse)
    assert "/proc/self/clear_refs" in working.answer(str(digits_bundle))["reason"]


def test_of_the_steps_the_first_is_run(digits_bundle, monkeypatch) -> None:
    ends: list[int] = []
    step = Executor._goes_on

    def counted(executor: Executor) -> Any:
        ends.append(1)
        return step(executor)

    monkeypatch.setattr(Executor, "_goes_on", counted)
    working.answer(str(digits_bundle))
    assert len(ends) == working.CALLS
