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
from diffkiln.interpreter.layers import decode_in_parts
from diffkiln.program import ALL_GATHER
from diffkiln.program.exchange import sent
from diffkiln.program.layers import sizes_of
from diffkiln.program.mesh import Mesh
from tests.exporters.regions import engine_cache
from tests.parallel.processes import ROOT, ended, start
from tests.parallel.specs import exchange_of, shared, shared_calls_of, tiled
from tests.passes.test_cache_schedule import draw, eager, keywords
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.more, *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS)]
NEGATIVE = {"negative_prompt": "blurred"}
GUIDANCE = {"guidance": 2}


def drawn(bundle: Path, output: Path, made: dict[str, Any], count: int, **more: Any) -> list[dict[str, Any]]:
    """What each process draws, and the bytes that it sends."""
    given = {key: value for key, value in keywords(made).items() if key != "output_type"} | NEGATIVE | more
    for code, _, errors in ended(start(count, "tests.parallel.worker", str(bundle), str(output), json.dumps(given))):
        assert code == 0, errors
    return [torch.load(f"{output}.{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl"])
def test_guidance_on_two_processes_draws_what_one_draws(family, families, tmp_path):
    compare(shared(families, family, GUIDANCE), tmp_path)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl", "lumina2", "cogvideox"])
def test_a_sequence_on_two_processes_is_drawn_as_on_one(family, families, tmp_path):
    compare(shared(families, family, {"sequence": 2}), tmp_path)


@pytest.mark.parametrize("family", ["flux", "wan", "qwen_image", "sdxl"])
def test_both_on_four_processes_draw_what_one_draws(family, families, tmp_path):
    compare(shared(families, family, {"guidance": 2, "sequence": 2}), tmp_path)


def test_engines_of_the_parts_of_blocks_run_on_two_processes(families, tmp_path):
    made = shared(families, "flux", {"sequence": 2})
    made["passes"] = [{"name": "compile", "component": "transformer"}]
    compare(made, tmp_path, cache=engine_cache())


def test_tiles_are_shared_and_the_first_process_alone_encodes(families, tmp_path):
    encoders = ["text_encoder", "text_encoder_2"]
    made = tiled(families, {"guidance": 2, "sequence": 2, "tiles": True, "first": encoders})
    first, *others = compare(made, tmp_path)
    assert first["held"] == [*encoders, "transformer", "vae"]
    assert [process["held"] for process in others] == [["transformer", "vae"]] * 3


def test_layers_on_two_processes_draw_what_one_draws(families, tmp_path):
    layered(shared(families, "flux", {"layers": 2}), tmp_path)


def test_guided_layers_of_engines_draw_what_one_draws_with_tables(families, tmp_path):
    made = shared(families, "flux", {"guidance": 2, "layers": 2})
    made["passes"] = [
        {"name": "hoist", "component": "transformer"},
        {"name": "compile", "component": "transformer"},
    ]
    layered(made, tmp_path, cache=engine_cache())


def layered(made: dict[str, Any], folder: Path, **more: Any) -> None:
    """Each process sends what its range gives, and holds no weights of other blocks."""
    built = diffkiln.compile(made, folder / "bundle", **more)
    wanted = draw(eager(made), made, **NEGATIVE)
    (programs,) = shared_calls_of(made).values()
    call = programs["call+negative"]
    processes = drawn(built.path, folder / "drawn", made, call.mesh.size)
    unread: set[int] = set()
    for process, held in zip(processes, call.held, strict=True):
        assert float((process["picture"] - wanted).abs().max()) <= 1e-5
        unread.add(held - process["nbytes"])  # of all processes, such as the decoder's other half
    assert len(unread) == 1
    blocks = sum(sizes_of(call.modules["transformer"]).values())
    assert min(process["nbytes"] for process in processes) <= sum(call.weights.values()) - unread.pop() - blocks // 2
    rows = call.mesh.count("guidance")
    given = [op for op in call.call.ops if op.name == ALL_GATHER]
    gathered = sum(sent(op, call.call) for op in given)
    own = sum(step.nbytes for step in call.exchanged) - gathered
    assert own > 0
    assert sum(process["all"] for process in processes) == rows * own + call.mesh.size * gathered


def test_diffusers_shares_the_tokens_in_its_own_way(families, tmp_path):
    made = shared(families, "flux", {"sequence": 2})
    built = diffkiln.compile(made, tmp_path / "bundle")
    wanted = draw(eager(made), made, **NEGATIVE)
    for process in drawn(built.path, tmp_path / "drawn", made, 2, as_diffusers=True):
        assert float((process["picture"] - wanted).abs().max()) <= 1e-5


def test_diffusers_refuses_branches_of_guidance(families, tmp_path):
    built = diffkiln.compile(shared(families, "flux", GUIDANCE), tmp_path / "bundle")
    given = json.dumps({"as_diffusers": True})
    for code, _, errors in ended(start(2, "tests.parallel.worker", str(built.path), str(tmp_path / "drawn"), given)):
        assert code == 1
        assert "diffusers has no way to run the branches of guidance on two" in errors


def compare(made: dict[str, Any], folder: Path, **more: Any) -> list[dict[str, Any]]:
    built = diffkiln.compile(made, folder / "bundle", **more)
    pipe = eager(made)
    if "tiles" in made["target"]["parallel"]:
        decode_in_parts(pipe.vae, False, True, 32)
    wanted = draw(pipe, made, **NEGATIVE)
    (programs,) = exchange_of(made).values()
    predicted = [step.nbytes for step in programs["call+negative"]]
    assert predicted[0] > 0
    processes = drawn(built.path, folder / "drawn", made, Mesh(made["target"]["parallel"]).size)
    for rank, process in enumerate(processes):
        assert float((process["picture"] - wanted).abs().max()) <= 1e-5
        if rank and "first" in made["target"]["parallel"]:
            assert process["all"] < sum(predicted)
            continue
        assert process["sent"] == predicted[:-1]
        assert process["all"] == sum(predicted)
    return processes


def test_engines_and_tables_run_on_two_processes(families, tmp_path):
    made = shared(families, "flux", GUIDANCE)
    made["passes"] = [
        {"name": "hoist", "component": "transformer"},
        {"name": "compile", "component": "transformer"},
    ]
    compare(made, tmp_path, cache=engine_cache())


def test_calls_that_are_made_ahead_are_shared_by_two_processes(families, tmp_path):
    made = shared(families, "flux", {"sequence": 2}, 3)
    made["passes"] = [{"name": "hoist", "component": "transformer"}]
    compare(made, tmp_path)


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
