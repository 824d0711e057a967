"""Engines on a GPU, tuned on it or built while it is hidden: they draw what diffusers draws, within its own error."""

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
from diffkiln.bundle import open_bundle
from diffkiln.exporters.aot_inductor.absent_gpu import torch_problem
from diffkiln.exporters.cuda import cuda_problems
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

_MISSING = [str(problem) for problem in cuda_problems()] if torch.cuda.is_available() else ["there is no CUDA GPU"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING)),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]
DENOISERS = {"flux": "transformer", "sdxl": "unet"}
_BUILD = "import json, sys, diffkiln; diffkiln.compile(json.loads(sys.argv[1]), sys.argv[2])"


def made(family: str, root: Path) -> dict[str, Any]:
    spec = spec_of(family, root)
    spec["source"]["dtype"] = "bfloat16"
    major, minor = torch.cuda.get_device_capability()
    numbers = {"compute_capability": f"{major}.{minor}", "memory_gb": 16, "h2d_gb_per_s": 20}
    passes = [
        {"name": "compile", "component": DENOISERS[family], "scope": "blocks", "between": True},
        {"name": "compile", "component": "text_encoder", "scope": "whole"},
        {"name": "compile", "component": "vae", "scope": "whole"},
        {"name": "compile", "component": "scheduler"},
    ]
    return spec | {"target": {"device": "cuda", **numbers}, "passes": passes}


def drawn(pipe: Any, spec: dict[str, Any]) -> torch.Tensor:
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt="a red fox", generator=generator, output_type="pt", **given).images.double().cpu()


def eager(spec: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(spec["source"]["model"]).to("cuda", torch.bfloat16).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        return drawn(pipe, spec)


@pytest.mark.parametrize("hidden", [False, True], ids=["tuned", "hidden"])
@pytest.mark.parametrize("family", DENOISERS)
def test_a_bundle_draws_within_twice_the_error_of_eager(
    family: str, hidden: bool, families: Path, tmp_path: Path
) -> None:
    if hidden and (problem := torch_problem()):
        pytest.skip(problem)
    spec = made(family, families)
    if hidden:
        subprocess.run(
            [sys.executable, "-c", _BUILD, json.dumps(spec), str(tmp_path / "bundle")],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            check=True,
        )
    else:
        diffkiln.compile(spec, tmp_path / "bundle")
    with open_bundle(tmp_path / "bundle") as bundle:
        gpus: Any = bundle.manifest.runtime["gpus"]
    assert [row["autotuned"] for row in gpus.values()] == [not hidden]
    exact, half = eager(spec, torch.float32), eager(spec, torch.bfloat16)
    with diffkiln.load(tmp_path / "bundle") as pipe:
        found = drawn(pipe, spec)
    assert float((found - exact).norm()) <= 2 * float((half - exact).norm())
