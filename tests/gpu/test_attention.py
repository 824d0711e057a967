"""Real attention kernels, torch's and those of packages that are installed, against diffusers' own choice."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import KERNELS
from diffkiln.program.attention import device_problem
from tests.passes.test_cache_schedule import draw, eager, spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]


def _usable() -> list[str]:
    """The kernels that this GPU runs and whose packages are there."""
    if not torch.cuda.is_available():
        return ["native_math"]
    capability = torch.cuda.get_device_capability()
    fit = [name for name in KERNELS if not device_problem(name, "cuda", capability)]
    return [name for name in fit if not KERNELS[name].package or _installed(KERNELS[name].package)]


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("kernel", _usable())
@pytest.mark.parametrize(("family", "component"), [("flux", "transformer"), ("sdxl", "unet")])
def test_a_kernel_draws_what_torchs_choice_draws(family, component, kernel, families, tmp_path):
    made = spec(families, family)
    made["source"]["dtype"] = "bfloat16"
    major, minor = torch.cuda.get_device_capability()
    made["target"] = {
        "device": "cuda", "compute_capability": f"{major}.{minor}", "memory_gb": 16, "h2d_gb_per_s": 20,
    }  # fmt: skip
    made["passes"] = [{"name": "attention_backend", "component": component, "backend": kernel}]
    built = diffkiln.compile(made, tmp_path / "bundle")
    with quiet_libraries():
        reference = eager(made).to("cuda", torch.bfloat16)
    with diffkiln.load(built.path, device="cuda") as pipe:
        difference = (draw(pipe, made).float() - draw(reference, made).float()).abs()
    assert float(difference.mean()) < (0.05 if kernel == "sage" else 0.02)
