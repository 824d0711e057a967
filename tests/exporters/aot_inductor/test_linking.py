"""What engines for a GPU are linked against where the real libraries are missing: the same names and no others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor.linking import declared, driver_library, torch_library

#: What torch's own library for CUDA exports for engines, in the release that the tests run with.
EXPORTS = frozenset(
    line for line in Path(__file__).with_name("exports.txt").read_text().splitlines() if not line.startswith("#")
)


def named(library: Path) -> tuple[str, set[str]]:
    """A library's own name, and the functions that it has."""
    listing = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    (name,) = re.findall(r"soname: \[(.*)\]", listing)
    return name, {line.split()[-1] for line in symbols.splitlines()}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the list is of torch 2.13")
def test_torchs_headers_declare_what_its_library_for_cuda_exports() -> None:
    """Headers of builds for CPUs say what to expect of another build. Which they do, without any exception."""
    assert declared() == EXPORTS


def test_the_driver_has_what_an_engine_calls_of_it(tmp_path: Path) -> None:
    driver_library(toolchain.find_compiler(), "cuLaunchKernel(f); cudaMalloc(p); cuLaunchKernel(g)", tmp_path / "made")
    name, functions = named(tmp_path / "made" / "libcuda.so")
    assert name == "libcuda.so.1"
    assert functions == {"cuLaunchKernel", "cuGetErrorString", "cuModuleUnload"}


def test_torchs_library_has_every_function_that_is_declared(tmp_path: Path) -> None:
    torch_library(toolchain.find_compiler(), tmp_path)
    assert named(tmp_path / "libtorch_cuda.so") == ("libtorch_cuda.so", set(declared()))
