"""The results of `benchmarks/peers_cpu.py`: kept by the line, ratios of one round, failures told."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("peers.results")


@pytest.fixture
def results(module: Any, tmp_path: Path) -> Any:
    made = module.Results(tmp_path / "results.jsonl")
    for way, seconds in (("bundle", 2.0), ("eager", 8.0)):
        made.add(module.Prepared("sd", way, 1.0, 10))
        for number in range(3):  # round 0 warms caches and does not count
            load = seconds if number else 100.0
            made.add(module.Run("sd", way, number, load, load * 2, (load,), 1.0, 2.0, 10))
    made.add(module.Run("sd", "openvino", 0, failed="exit 1: no such operator"))
    return made


def test_an_interrupted_run_goes_on_where_it_was(module: Any, results: Any, tmp_path: Path) -> None:
    again = module.Results(tmp_path / "results.jsonl")
    assert again.has("sd", "bundle", 2)
    assert not again.has("sd", "bundle", 3)
    assert again.has("sd", "openvino", 1)  # it failed, and is not tried again
    again.forget(["bundle"], ["sd"])
    assert not module.Results(tmp_path / "results.jsonl").has("sd", "bundle", 2)
    assert again.preparation("sd", "bundle") is not None


def test_ratios_are_of_counted_rounds_and_failures_are_told(module: Any, results: Any) -> None:
    told = module.render(results, "sd", ["bundle", "eager", "openvino"])
    assert "| bundle | 0.25 | 0.25 | 0.25 | 1.00 | 1.00 | 1.00 |" in told
    assert "- openvino: exit 1: no such operator" in told


def test_what_a_bundle_compiles_names_components_that_the_pipeline_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for mid in import_module("peers.pipelines").MID.values():
        assert [step["component"] for step in mid.passes] == [mid.denoiser, *mid.text_encoders, "vae"]
