"""split_guidance: what a wrong spec is told, and the programs that it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.compile import check
from diffkiln.errors import CallError, IllegalPlan, Incompatible, SpecError
from diffkiln.program import ALL_GATHER
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.processes import Group, mesh_of
from diffkiln.runtime.processes.threads import in_threads
from tests.parallel.specs import exchange_of, shared
from tests.passes.test_cache_schedule import draw, eager
from tests.passes.test_guidance import called
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
TWO = {"guidance": 2}


def refused(made: dict[str, Any], error: type[Exception] = IllegalPlan) -> str:
    with pytest.raises(error) as caught:
        check(made)
    return str(caught.value)


def test_the_target_adds_the_pass_for_the_denoiser(families):
    plan = check(shared(families, "sdxl", TWO))
    (ran,) = plan.report
    assert (ran.listed.where, ran.listed.step.name) == ("$.target.parallel.guidance", "split_guidance")
    assert ran.listed.step.component == "unet"


def test_it_may_stand_in_the_list(families):
    made = shared(families, "sdxl", TWO)
    made["passes"] = [{"name": "split_guidance", "component": "unet"}]
    assert [ran.listed.where for ran in check(made).report] == ["$.passes[0]"]
    del made["target"]["parallel"]
    assert "$.passes[0]: the target has one process for both branches" in refused(made)


def test_it_is_for_a_denoiser(families):
    made = shared(families, "sdxl", TWO)
    made["passes"] = [{"name": "split_guidance", "component": "vae"}]
    assert "vae is not a part of the denoising run. Choose the denoiser" in refused(made)


def test_what_is_not_guided_has_no_branches(families):
    made = shared(families, "flux", TWO)
    made["inputs"]["call"]["true_cfg_scale"] = 1.0
    assert "and is evaluated once a step, so there are no two branches" in refused(made)


def test_guidance_that_is_changed_is_not_split(families):
    made = shared(families, "sdxl", TWO)
    made["passes"] = [{"name": "guidance", "component": "unet", "batch": "halved"}]
    assert "split_guidance cannot follow guidance: guidance has changed how the denoiser is called" in refused(made)


def test_a_schedule_comes_after_it(families):
    made = shared(families, "flux", TWO)
    schedule = {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}
    made["passes"] = [schedule, {"name": "split_guidance", "component": "transformer"}]
    assert "split_guidance must come before cache_schedule" in refused(made)


def test_graphs_and_gates_are_of_one_process(families):
    made = shared(families, "sdxl", TWO)
    made["runtime"] = {"cuda_graphs": "step"}
    assert "$.runtime.cuda_graphs: a graph holds one process's work" in refused(made, SpecError)
    made = shared(families, "sdxl", TWO)
    made["quality"] = [{"metric": "psnr", "min": 30, "prompts": ["a fox"]}]
    assert "$.quality: gates are evaluated in one process" in refused(made, SpecError)


@pytest.mark.more
def test_a_bundle_draws_the_same_in_the_threads_of_its_processes(families, tmp_path):
    made = shared(families, "sdxl", TWO)
    built = diffkiln.compile(made, tmp_path / "bundle")
    wanted = draw(eager(made), made, negative_prompt="blurred")
    (programs,) = exchange_of(made).values()

    def run(group: Group) -> tuple[torch.Tensor, int, list[str], list[str]]:
        with open_bundle(built.path) as bundle:
            verified = bundle.verify()
        with load_verified(verified, None, "cpu", LoadOptions(group=group)) as pipe:
            picture = draw(pipe, made, negative_prompt="blurred")
            ops = pipe.variants[0].programs["call+negative"].ops
            assert pipe.rank == group.rank
            with pytest.raises(CallError, match="one cannot end it for the others"):
                pipe(prompt="x", callback_on_step_end=lambda ran, *_: ran.interrupt(), negative_prompt="y")
            return picture, group.sent, called(pipe), [op.name for op in ops]

    with open_bundle(built.path) as bundle:
        manifest = bundle.manifest
    assert manifest.runtime["parallel"] == TWO
    assert "processes" in manifest.features_required
    mesh = mesh_of(manifest)
    assert mesh is not None
    for picture, sent, calls, names in in_threads(mesh, run):
        assert float((picture - wanted).abs().max()) <= 1e-5
        assert sent >= sum(step.nbytes for step in programs["call+negative"])
        assert calls == ["unet.halved"] * 2
        assert names.count(ALL_GATHER) == 2


@pytest.mark.more
def test_one_process_alone_is_told_how_to_start(families, tmp_path):
    built = diffkiln.compile(shared(families, "sdxl", TWO), tmp_path / "bundle")
    reason = r"runs in 2 processes \(guidance 2\), and this process is alone.*--processes 2.*--nproc-per-node 2"
    with pytest.raises(Incompatible, match=reason):
        diffkiln.load(built.path)
