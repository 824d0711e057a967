"""Engines for three GPUs that are not there: what is in them, and that nothing of the stand-ins is left."""

from __future__ import annotations

import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import ExportError
from diffkiln.exporters.aot_inductor.absent_gpu import absent_gpu
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.aot_inductor.linking import declared
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.spec import TARGETS
from tests.cross import blocks
from tests.exporters.regions import block, engine_cache, in_type
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.cross, *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS)]


@cache
def built(name: str, sm: str) -> Artefact:
    return AotInductor().export(Lowering(blocks.small(name), TARGETS[blocks.TARGETS[sm]]), engine_cache())


def library(artefact: Artefact) -> Path:
    (found,) = artefact.directory.rglob("engine.so")
    return found


def readelf(*arguments: str) -> str:
    return subprocess.run(["readelf", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", sorted(blocks.SMALL))
@pytest.mark.parametrize("sm", sorted(blocks.TARGETS))
class TestEngines:
    def test_holds_kernels_for_the_sm_that_was_asked_for_and_no_other(self, name: str, sm: str) -> None:
        artefact = built(name, sm)
        found = cubins_of(library(artefact))
        assert len(found) > 3
        assert {cubin.sm for cubin in found} <= {sm, sm.removesuffix("a")}  # of which assemblers mark some, or all
        assert artefact.requires["sm"] == sm
        assert artefact.autotuned is False

    def test_holds_no_ptx_which_would_not_be_portable(self, name: str, sm: str) -> None:
        data = library(built(name, sm)).read_bytes()
        assert b".visible .entry" not in data
        assert b".target sm_" not in data

    def test_asks_for_the_drivers_library_by_its_own_name(self, name: str, sm: str) -> None:
        listing = readelf("-d", str(library(built(name, sm))))
        assert "[libcuda.so.1]" in listing
        assert f"[libcudart.so.{str(torch.version.cuda).partition('.')[0]}]" in listing
        assert "RPATH" not in listing
        assert "RUNPATH" not in listing

    def test_names_no_place_where_it_was_built(self, name: str, sm: str) -> None:
        data = library(built(name, sm)).read_bytes()
        for place in (b"diffkiln-export-", str(Path(torch.__file__).parent).encode(), b"/triton/"):
            assert place not in data


def without_engines(folder: Path) -> EngineCache:
    """A cache that has what builds share, and no engine yet."""
    cache = EngineCache(folder)
    shutil.copytree(engine_cache().toolchain, cache.toolchain, dirs_exist_ok=True)
    return cache


def test_the_same_engine_is_built_twice(tmp_path: Path) -> None:
    cache = without_engines(tmp_path)
    again = AotInductor().export(Lowering(blocks.small("SDXL"), TARGETS["nvidia-l4"]), cache)
    assert library(again).read_bytes() == library(built("SDXL", "sm_89")).read_bytes()


def test_torchs_library_has_what_its_headers_declare() -> None:
    """A torch for CPUs has the headers alone, and links engines by them (test_linked.py)."""
    real = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    listing = subprocess.run(["nm", "-D", "--defined-only", real], capture_output=True, text=True, check=True).stdout
    exported = {name for name in (line.split()[-1] for line in listing.splitlines()) if name.startswith("aoti_torch")}
    assert declared() == exported
    assert "libtorch_cuda.so" in readelf("-dW", str(real))


def test_an_engine_calls_the_same_whether_its_library_for_cuda_is_the_real_one_or_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Functions of torch and of CUDA. Of the C++ library's, torch has copies, which the linker takes first."""

    def called(artefact: Artefact) -> set[str]:
        listing = subprocess.run(["nm", "-D", "-u", library(artefact)], capture_output=True, text=True, check=True)
        names = {line.split()[-1] for line in listing.stdout.splitlines()}
        return {name for name in names if not name.startswith("_Z")}

    cache = without_engines(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)  # as a torch for CPUs of the same release
    empty = AotInductor().export(Lowering(blocks.small("SDXL"), TARGETS["nvidia-l4"]), cache)
    monkeypatch.undo()
    real = built("SDXL", "sm_89")
    assert called(empty) == called(real)
    assert empty.requires == real.requires
    assert kernels(empty) == kernels(real)


def kernels(artefact: Artefact) -> list[bytes]:
    """The GPU code of an engine: each cubin, which ends with its tables of segments and of sections."""
    data, found = library(artefact).read_bytes(), []
    for cubin in cubins_of(library(artefact)):
        segments, sections = struct.unpack_from("<QQ", data, cubin.offset + 32)
        sizes = struct.unpack_from("<HHHH", data, cubin.offset + 54)
        size = max(segments + sizes[0] * sizes[1], sections + sizes[2] * sizes[3])
        found.append(data[cubin.offset : cubin.offset + size])
    return found


def test_attention_is_by_the_kernel_of_the_type() -> None:
    target = TARGETS["nvidia-l4"]
    for region, kernel in ((block(), b"efficient_attention"), (in_type(block(), "float16"), b"flash_attention")):
        artefact = AotInductor().export(Lowering(region, target), engine_cache())
        assert b"_scaled_dot_product_" + kernel in library(artefact).read_bytes()


def test_another_gpus_numbers_are_forgotten() -> None:
    """Two targets in one process, and torch's own answers afterwards."""
    assert {cubin.sm for sm in ("sm_80", "sm_89") for cubin in cubins_of(library(built("Flux", sm)))} == {
        "sm_80",
        "sm_89",
    }
    assert torch.cuda.is_available() is False
    assert torch.cuda.device_count() == 0


def test_leaves_torch_and_triton_as_they_were() -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]

    def state() -> list[object]:
        owners = (torch.cuda, CudaInterface, CudaInterface.Worker, PythonWrapperCodegen)
        return [dict(vars(owner)) for owner in owners] + [driver._active]

    before = state()
    with absent_gpu((8, 9)):
        assert torch.cuda.get_device_capability() == (8, 9)
        assert state() != before
    assert state() == before


def test_convolutions_in_bfloat16_keep_channels_last_as_on_the_gpu() -> None:
    with absent_gpu((8, 9)), FakeTensorMode():
        image = torch.empty(1, 16, 8, 8, dtype=torch.bfloat16, device="cuda:0").to(memory_format=torch.channels_last)
        weight = torch.empty(16, 16, 3, 3, dtype=torch.bfloat16, device="cuda:0")
        convolved = torch.ops.aten.convolution.default(image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        assert convolved.is_contiguous(memory_format=torch.channels_last)


def test_a_missing_assembler_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
    with pytest.raises(ExportError, match=r"ptxas.*pip install --force-reinstall triton"):
        AotInductor().export(Lowering(block(), TARGETS["nvidia-l4"]), EngineCache(tmp_path))
