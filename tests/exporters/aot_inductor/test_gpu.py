"""AOTInductor for GPUs, as far as no CUDA is needed: refusals, options, and what an engine is linked with."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffkiln.errors import ExportError
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor import build as aot_inductor
from diffkiln.exporters.aot_inductor import check
from diffkiln.exporters.aot_inductor import gpu as cuda
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.cubins import Cubin
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.spec import TARGETS
from tests.exporters.regions import CPU, block

L4, H200 = TARGETS["nvidia-l4"], TARGETS["nvidia-h200"]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch built with CUDA 13, on a machine without a GPU that lacks nothing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(check, "cuda_problems", lambda: iter(()))
    for module in (check, cuda):
        monkeypatch.setattr(module, "gpu_is_here", lambda _: False)
    return monkeypatch


def reasons(target=L4) -> str:
    return "\n".join(map(str, AotInductor().check(block(), target, {})))


def test_a_torch_without_cuda_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.12.0+cpu")
    with pytest.raises(ExportError, match=r"'Block'.*\n.*built without CUDA.*pip install"):
        AotInductor().export(Lowering(block(), L4), EngineCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_gpu_that_is_not_there_is_taken(with_cuda: pytest.MonkeyPatch) -> None:
    assert reasons() == ""


def test_only_without_the_gpu_does_torchs_version_matter(with_cuda: pytest.MonkeyPatch) -> None:
    with_cuda.setattr(torch, "__version__", "2.16.0")
    assert "written for 2.11 to 2.15" in reasons()
    with_cuda.setattr(check, "gpu_is_here", lambda _: True)
    assert reasons() == ""


def test_promises_that_this_cuda_breaks_are_refused(with_cuda: pytest.MonkeyPatch) -> None:
    told = reasons(replace(L4, driver="570.26", cuda="12.8"))
    assert "$.target.driver: found 570.26, required 580.65.06 or later: engines hold code of CUDA 13.0" in told
    assert "$.target.cuda: found 12.8, required 13.0 or later" in told
    assert reasons(replace(L4, driver="590.0", cuda="13.0")) == ""


def test_nothing_is_timed_without_the_gpu_and_the_other_flags_hold(with_cuda: pytest.MonkeyPatch) -> None:
    asked = {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}
    absent = cuda.gpu_options(L4, asked)
    assert absent["shape_padding"] is False
    assert absent["epilogue_fusion"] is False
    assert not absent.keys() & set(cuda.TUNING)
    with_cuda.setattr(cuda, "gpu_is_here", lambda _: True)
    here = cuda.gpu_options(L4, asked)
    assert here["max_autotune"] is True
    assert here["coordinate_descent_tuning"] is True
    assert "shape_padding" not in here


@pytest.mark.parametrize(("built_with", "torchs"), [("13.0", False), (None, True)])
def test_engines_are_linked_with_empty_libraries_for_those_that_are_missing(
    built_with: str | None, torchs: bool, with_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_cuda.setattr(torch.version, "cuda", built_with)
    with_cuda.setattr(cuda, "find_cudart", lambda: Path("/cuda/libcudart.so.13"))
    with_cuda.setattr(cuda, "find_library_headers", lambda: Path("/cuda/cccl"))
    flags = toolchain.Flags(toolchain.find_compiler(), "x86-64-v3", ("-g0",), ("-lcuda",))
    found = cuda.gpu_flags(flags, "cuLaunchKernel(f); cudaMalloc(p); cuLaunchKernel(g)", tmp_path)
    assert found.compile == ("-g0", "-isystem", "/cuda/cccl")
    assert found.link == (f"-L{tmp_path / 'empty'}", "-lcuda", "/cuda/libcudart.so.13")
    assert (tmp_path / "empty" / "libcuda.so").exists()
    assert (tmp_path / "empty" / "libtorch_cuda.so").exists() is torchs


def test_what_it_asks_of_the_machine(with_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cuda.setattr(cuda, "cubins_of", lambda _: [Cubin("sm_90a", 0)])
    asked = {"sm": "sm_90a", "cuda": "13.0", "driver": "580.65.06"}
    assert cuda.gpu_requirements(tmp_path, H200) == asked
    with_cuda.setattr(cuda, "cubins_of", lambda _: [Cubin("sm_90a", 0), Cubin("sm_90", 1)])
    assert cuda.gpu_requirements(tmp_path, H200) == asked  # a kernel of CUDA 13 that uses no features of its own
    with_cuda.setattr(cuda, "cubins_of", lambda _: [Cubin("sm_90a", 0)])
    with pytest.raises(ExportError, match="assembled for sm_90a, not for sm_89"):
        cuda.gpu_requirements(tmp_path, L4)


@pytest.mark.parametrize("target", [CPU, L4])
def test_too_little_disk_is_found_before_the_compile(target, with_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    with_cuda.setattr(aot_inductor.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 4096, 4096))
    with_cuda.setattr(cuda, "gpu_tools", lambda _: {})
    with_cuda.setattr(aot_inductor, "_generate", lambda *_: pytest.fail("something was compiled"))
    with pytest.raises(ExportError, match=r"may take 536870912 bytes, and there are 4096 on the disk.*TMPDIR"):
        AotInductor().export(Lowering(block(), target), EngineCache(tmp_path))


def test_an_engine_tuned_on_a_gpu_is_another_than_one_that_is_not(with_cuda: pytest.MonkeyPatch) -> None:
    with_cuda.setitem(__import__("sys").modules, "triton", type("triton", (), {"__version__": "3.7.1"}))
    absent = cuda.gpu_tools(L4)
    with_cuda.setattr(cuda, "gpu_is_here", lambda _: True)
    with_cuda.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert cuda.gpu_tools(L4) != absent
