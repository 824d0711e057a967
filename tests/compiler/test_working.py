"""A build measures the working memory of a bundle in a process of its own, and notes it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.cli import main
from diffkiln.compiler import compile as compiling
from diffkiln.compiler import working
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.working import Measured, measured_here
from diffkiln.errors import IllegalPlan, Incompatible
from diffkiln.program.working import PLANNED_FROM
from tests.bundle.making import make
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]
ROW = {"bytes": 10_000_000, "threads": 64}


def plan(weights: int = PLANNED_FROM, device: str = "cpu", parallel: Any = None, reason: str = "") -> Any:
    return SimpleNamespace(
        spec=SimpleNamespace(parallel=parallel),
        recording=SimpleNamespace(reason=reason),
        bytes_after={"transformer": weights},
        targets=(SimpleNamespace(device=device),),
    )


def spec(limit: str | None = None) -> dict[str, Any]:
    return {
        "spec_version": 1,
        "source": {"model": str(DIGITS / "model")},
        "target": {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 2, "call": {"max_sequence_length": 16}},
        "runtime": {"offload": {"strategy": "auto", "max_memory": limit}} if limit else {},
    }


@pytest.mark.parametrize(
    "other", [{"weights": PLANNED_FROM - 1}, {"device": "cuda"}, {"parallel": {"guidance": 2}}, {"reason": "no"}]
)
def test_nothing_is_measured_of_what_has_no_plan_of_it(other: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr(working, "_answer", lambda _root: pytest.fail("measured"))
    assert measured_here(Path("bundle"), plan(**other), Stages()) == Measured()


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (subprocess.TimeoutExpired("python", 600), "longer than 600 seconds"),
        (subprocess.CalledProcessError(-9, "python"), "ended with status -9"),
        (OSError("no room"), "no process can measure it here: no room"),
    ],
)
def test_what_fails_is_a_notice(failure: Exception, reason: str, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    make(tmp_path / "bundle")
    (notice,) = measured_here(tmp_path / "bundle", plan(), Stages()).notices
    assert notice.startswith("plans of memory use an estimate of the working memory: ")
    assert reason in notice


def test_nothing_is_imported_from_the_current_directory(digits_bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert "bytes" in working._answer(Path(digits_bundle).resolve())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The digits without engines, whose working memory is planned although they are small."""
    made = tmp_path_factory.mktemp("working") / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(working, "PLANNED_FROM", 1)
        built = diffkiln.compile(spec(), made)
    assert not [notice for notice in built.notices if "working memory" in notice]
    return made


def test_what_was_measured_is_no_part_of_the_id_and_plans_count_it(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        runtime: Any = opened.manifest.runtime
        ((target, row),) = opened.build["working_memory"].items()
    assert "working_memory" not in runtime
    assert target in runtime["targets"]
    (calls,) = diffkiln.plan_memory(bundle).values()
    found = calls["call"]
    assert found.working is not None
    assert found.working.measured
    assert found.working.nbytes == row["bytes"]
    assert {peak.working for peak in found.rows} == {row["bytes"]}
    assert max(peak.total for peak in found.rows) == found.residency.peak


def test_a_limit_within_the_working_memory_is_refused_and_says_so(bundle: Path) -> None:
    with pytest.raises(Incompatible, match=r"beside [\d,]+ bytes of working memory, measured"):
        diffkiln.load(bundle, max_memory="1MB")


def test_the_command_says_that_it_was_measured(bundle: Path, capsys) -> None:
    assert main(["memory", str(bundle)]) == 0
    assert "of it are working memory, measured" in capsys.readouterr().out


def test_a_limit_that_what_was_measured_breaks_is_refused_before_the_bundle_is_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "measured_here", lambda *_: Measured({"cpu-x86-64-v3": ROW}))
    with pytest.raises(IllegalPlan, match=r"beside 10,000,000 bytes of working memory, measured"):
        diffkiln.compile(spec("4MB"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
