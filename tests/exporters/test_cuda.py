"""What this machine lacks to build for a GPU: each thing with the package that brings it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from diffkiln.exporters import cuda
from diffkiln.exporters.cuda import (
    cuda_problems,
    cuda_version,
    find_headers,
    find_library_headers,
    find_ptxas,
    gpu_is_here,
)
from diffkiln.spec import TARGETS

#: As they are, beside what `toolkit` puts in their place.
WHEELS, HOMES = cuda._wheels, cuda._homes


def told() -> str:
    return "\n".join(map(str, cuda_problems()))


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch built with CUDA 13, and all that it needs, in one folder."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("cuda_runtime_api.h", "cuda_fp16.h", "crt/host_defines.h", "cccl/nv/target"):
        (tmp_path / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "include" / name).touch()
    (tmp_path / "include" / "cuda.h").write_text("#define CUDA_VERSION 13010\n")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart.so.13").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch(mode=0o755)
    monkeypatch.setattr(cuda, "_triton", lambda: tmp_path)
    monkeypatch.setattr(cuda, "_wheels", list)
    monkeypatch.setattr(cuda, "_homes", lambda: [tmp_path])
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    return tmp_path


def test_nothing_is_missing(toolkit: Path) -> None:
    assert told() == ""
    assert find_headers() == toolkit / "include"
    assert find_library_headers() == toolkit / "include" / "cccl"


@pytest.fixture
def for_cpus(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch built for CPUs, of a release whose build with CUDA is known, and all that building needs."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(cuda, "_installed", lambda _: "3.7.1")
    return monkeypatch


def test_a_torch_for_cpus_builds_for_the_cuda_of_its_release(for_cpus: pytest.MonkeyPatch) -> None:
    assert told() == ""
    assert cuda_version() == "13.0"


def test_a_torch_whose_other_build_is_not_known_is_told_what_to_install_and_nothing_else(
    for_cpus: pytest.MonkeyPatch,
) -> None:
    for_cpus.setattr(torch, "__version__", "2.12.0+cpu")
    (problem,) = cuda_problems()
    assert "found 2.12.0+cpu, which is built without CUDA" in problem.reason
    assert "release 2.13" in problem.hint
    assert "pip install --force-reinstall 'torch===2.12.0'" in problem.hint
    assert cuda_version() is None


def test_a_torch_for_cpus_asks_for_the_triton_of_its_release(for_cpus: pytest.MonkeyPatch) -> None:
    for_cpus.setattr(cuda, "_installed", lambda _: "3.8.0")
    (problem,) = cuda_problems()
    assert str(problem) == (
        "triton: found 3.8.0, required 3.7.1: torch 2.13.0 generates code for that version. pip install triton==3.7.1"
    )


@pytest.mark.parametrize(
    ("missing", "package"),
    [
        ("bin/ptxas", "ptxas.*pip install --force-reinstall triton"),
        ("include/crt/host_defines.h", "cuda.h.*pip install --force-reinstall triton"),
        ("include/cccl/nv/target", r"nv/target.*pip install 'nvidia-cuda-cccl==13\.\*'"),
        ("lib64/libcudart.so.13", r"libcudart\.so\.13.*pip install 'nvidia-cuda-runtime==13\.\*'"),
    ],
)
def test_what_is_missing_names_its_package(toolkit: Path, missing: str, package: str) -> None:
    import re

    (toolkit / missing).unlink()
    (problem,) = cuda_problems()
    assert re.search(package, str(problem))


def test_triton_is_told_apart_from_its_assembler(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    assert "pip install triton" in told()


def test_a_package_in_another_folder_of_pythons_path_is_found(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pip install --target` leaves it where torch's own folder is not to be written to."""
    (toolkit / "include" / "cccl" / "nv" / "target").unlink()
    headers = tmp_path / "site" / "nvidia" / "cu13" / "include" / "cccl"
    (headers / "nv").mkdir(parents=True)
    (headers / "nv" / "target").touch()
    monkeypatch.setattr(cuda, "_wheels", WHEELS)
    monkeypatch.setattr(cuda, "find_spec", find_spec)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "elsewhere" / "torch" / "__init__.py"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert find_library_headers() == headers


def test_the_toolkit_of_the_compiler_on_the_path_counts(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toolkit / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setattr(cuda, "_homes", HOMES)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert find_library_headers() == toolkit / "include" / "cccl"


def test_headers_of_another_major_version_do_not_count(toolkit: Path) -> None:
    (toolkit / "include" / "cuda.h").write_text("#define CUDA_VERSION 12080\n")
    assert find_headers() is None


def test_the_assembler_that_was_chosen_is_the_one_that_counts(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(toolkit / "none"))
    assert find_ptxas() is None


def test_a_gpu_is_here_if_it_is_of_the_targets_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_is_here(TARGETS["nvidia-h200"])
    assert not gpu_is_here(TARGETS["nvidia-l4"])
