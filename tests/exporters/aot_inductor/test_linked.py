"""Engines and a bundle for an RTX 4090, by a torch for CPUs, on a machine without CUDA and without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from diffkiln.cli import main
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.cuda import find_cudart, find_headers
from diffkiln.spec import TARGETS
from tests.conftest import DIGITS
from tests.exporters.aot_inductor.test_linking import EXPORTS
from tests.exporters.regions import block, engine_cache, in_type
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA: see tests/cross"),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]


@cache
def built() -> Artefact:
    return AotInductor().export(Lowering(in_type(block(), "float16"), TARGETS["nvidia-rtx-4090"]), engine_cache())


def library() -> Path:
    (found,) = built().directory.rglob("engine.so")
    return found


def symbols(which: str, file: Path) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, file], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines()}


def test_holds_kernels_for_its_gpu_alone() -> None:
    assert {cubin.sm for cubin in cubins_of(library())} == {"sm_89"}
    assert built().autotuned is False
    asked = built().requires
    assert (asked["sm"], asked["cuda"], asked["driver"]) == ("sm_89", "13.0", "580.65.06")


def test_asks_for_the_real_libraries_by_their_own_names() -> None:
    listing = subprocess.run(["readelf", "-dW", library()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listing)
    assert {"libtorch_cpu.so", "libtorch_cuda.so", "libcuda.so.1", "libcudart.so.13"} <= set(needed)
    assert "RUNPATH" not in listing


def test_every_function_that_it_calls_is_one_that_the_real_libraries_have() -> None:
    """Torch's for CUDA by the list of its exports, the driver's by its header, the others by the libraries."""
    called = symbols("--undefined-only", library())
    headers, runtime = find_headers(), find_cudart()
    assert headers is not None
    assert runtime is not None
    torchs = EXPORTS | symbols("--defined-only", Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    drivers = set(re.findall(r"\bCUDAAPI (cu\w+)\(", (headers / "cuda.h").read_text()))
    kinds = {"aoti_torch_": torchs, "cuda": symbols("--defined-only", runtime), "cu": drivers}
    seen = dict.fromkeys(kinds, 0)
    for name in sorted(called):
        kind = next((kind for kind in kinds if name.startswith(kind)), None)
        if kind is not None:
            seen[kind] += 1
            assert name in kinds[kind]
    assert all(count > 3 for count in seen.values()), seen
    assert called & EXPORTS, "it calls nothing of torch's library for CUDA"


def test_nothing_is_left_of_the_gpu_that_was_not_there() -> None:
    built()
    assert torch.version.cuda is None
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.empty(1, device="cuda")


def test_a_bundle_says_what_it_needs_and_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", os.environ["DIFFKILN_TEST_CACHE"])
    bundle = tmp_path / "digits-gpu"
    assert main(["compile", str(DIGITS / "spec-gpu.json"), "-o", str(bundle)]) == 0
    told = capsys.readouterr()
    assert "the engines for nvidia-rtx-4090 were built without its GPU, so nothing is tuned" in told.out + told.err
    assert main(["inspect", str(bundle)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "target nvidia-rtx-4090: a GPU that runs sm_89, CUDA 13.0, driver 580.65.06 or later" in shown
    assert "transformer/FluxTransformerBlock aot_inductor for nvidia-rtx-4090" in shown
    assert main(["run", str(bundle), "--prompt", "seven", "-o", str(tmp_path / "image.png")]) == 5
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.match(r"error: gpu: found none that torch .* can use, required nvidia-rtx-4090 \(sm_89\)", error)
