"""Bundles of tiny pipelines in real processes, over gloo, against diffusers in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.compiler.compile import exchange_of
from diffkiln.program.mesh import Mesh
from tests.exporters.regions import engine_cache
from tests.parallel.processes import ROOT, ended, start
from tests.parallel.specs import shared
from tests.passes.test_cache_schedule import draw, eager, keywords
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.more, *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS)]
NEGATIVE = {"negative_prompt": "blurred"}
GUIDANCE = {"guidance": 2}


def drawn(bundle: Path, output: Path, made: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What each process draws, and the bytes that it sends."""
    given = {key: value for key, value in keywords(made).items() if key != "output_type"} | NEGATIVE
    for code, _, errors in ended(start(count, "tests.parallel.worker", str(bundle), str(output), json.dumps(given))):
        assert code == 0, errors
    return [torch.load(f"{output}.{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl"])
def test_guidance_on_two_processes_draws_what_one_draws(family, families, tmp_path):
    compare(shared(families, family, GUIDANCE), tmp_path)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl"])
def test_a_sequence_on_two_processes_is_drawn_as_on_one(family, families, tmp_path):
    compare(shared(families, family, {"sequence": 2}), tmp_path)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl"])
def test_both_on_four_processes_draw_what_one_draws(family, families, tmp_path):
    compare(shared(families, family, {"guidance": 2, "sequence": 2}), tmp_path)


def test_engines_of_the_parts_of_blocks_run_on_two_processes(families, tmp_path):
    made = shared(families, "flux", {"sequence": 2})
    made["passes"] = [{"name": "compile", "component": "transformer"}]
    compare(made, tmp_path, cache=engine_cache())


def compare(made: dict[str, Any], folder: Path, **more: Any) -> None:
    built = diffkiln.compile(made, folder / "bundle", **more)
    wanted = draw(eager(made), made, **NEGATIVE)
    (programs,) = exchange_of(made).values()
    predicted = [step.nbytes for step in programs["call+negative"]]
    assert predicted[0] > 0
    for process in drawn(built.path, folder / "drawn", made, Mesh(made["target"]["parallel"]).size):
        assert float((process["picture"] - wanted).abs().max()) <= 1e-5
        assert process["sent"] == predicted[:-1]
        assert process["all"] == sum(predicted)


def test_engines_and_tables_run_on_two_processes(families, tmp_path):
    made = shared(families, "flux", GUIDANCE)
    made["passes"] = [
        {"name": "hoist", "component": "transformer"},
        {"name": "compile", "component": "transformer"},
    ]
    compare(made, tmp_path, cache=engine_cache())


def test_the_command_starts_processes_and_the_first_writes(families, tmp_path):
    built = diffkiln.compile(shared(families, "sdxl", GUIDANCE), tmp_path / "bundle")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "diffkiln", "run", str(built.path), "--prompt", "a fox"]
        return subprocess.run([*command, *more], cwd=ROOT, env=os.environ, text=True, capture_output=True)

    picture = tmp_path / "fox.png"
    done = run("-o", str(picture), "--seed", "5", "--processes", "2")
    assert (done.returncode, done.stdout.strip()) == (0, str(picture)), done.stderr
    assert picture.is_file()
    wrong = run("-o", str(picture), "--processes", "4")
    assert wrong.returncode == 2
    assert "This bundle runs in 2 processes (guidance 2). Use --processes 2" in wrong.stderr
    refused = run("-o", str(picture), "--set", "num_inference_steps=900", "--processes", "2")
    assert refused.returncode == 2
    assert "num_inference_steps" in refused.stderr
