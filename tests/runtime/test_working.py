"""The process that measures the working memory of a bundle."""

from __future__ import annotations

import json

import pytest
import torch

from diffkiln.bundle import open_bundle
from diffkiln.guards.host_memory import present
from diffkiln.runtime import working
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def answer_of(bundle, capfd) -> dict[str, object]:
    """Returns what the process prints, without starting one."""
    assert working.main(str(bundle)) == 0
    return json.loads(capfd.readouterr().out)


def test_a_bundle_is_called_once_and_measured(digits_bundle, capfd) -> None:
    found = answer_of(digits_bundle, capfd)
    assert found["threads"] == torch.get_num_threads()
    assert found["bytes"] % working.NOTCH == 0  # type: ignore[operator]
    with open_bundle(digits_bundle) as opened:
        assert found["target"] in opened.manifest.runtime["targets"]  # type: ignore[operator]


def test_too_much_work_is_a_reason(digits_bundle, capfd, monkeypatch) -> None:
    monkeypatch.setattr(working, "MOST_WORK", 1.0)
    assert "TFLOP" in str(answer_of(digits_bundle, capfd)["reason"])


def test_what_is_no_bundle_is_a_reason(tmp_path, capfd) -> None:
    assert "manifest.json" in str(answer_of(tmp_path, capfd)["reason"])


def test_only_one_step_is_counted_and_run(digits_bundle, monkeypatch) -> None:
    ran: list[str] = []
    taken = working._taken

    def noted(pipe, call, plan, before) -> int:
        found = taken(pipe, call, plan, before)
        ran.append(f"{pipe.executor.store.bytes_brought > 0}")
        whole = sum(phase.work.total for phase in plan.phases)
        assert working._work(call, plan) < whole / 2
        return found

    monkeypatch.setattr(working, "_taken", noted)
    with open_bundle(digits_bundle) as opened:
        verified = opened.verify(roles={"program", "config", "native"})
    with verified:
        working._measured(verified, present())
    assert ran == ["True"]
