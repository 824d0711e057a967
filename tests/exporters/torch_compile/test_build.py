"""What `torch.compile` is asked to prepare, and what is refused before it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from diffkiln.errors import ExportError
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.torch_compile.check import TorchCompile
from diffkiln.interpreter.fx import CACHES, OPTIONS, REGION
from diffkiln.program import Program, program_from_json
from diffkiln.program.sizes import families
from diffkiln.spec.targets import Target
from tests.exporters.regions import CPU, Writer, attending_by_package, built_jit, engine_cache, gated, stated


def total(rows: int) -> Program:
    w = Writer()
    return w.program("Total", w.op("sum.dim_IntList", w.value("%x", rows, 4), (1,)))


L4 = Target(name="cuda-sm89", device="cuda", compute_capability="8.9")


def test_engine_is_the_region_and_what_inductor_wrote():
    region, artefact = built_jit(gated)
    assert artefact.backend == "torch_compile"
    assert program_from_json(json.loads((artefact.directory / REGION).read_bytes())) == region
    assert json.loads((artefact.directory / OPTIONS).read_text()) == {
        "device": "cpu",
        "flags": {},
        "fullgraph": True,
        "isa": "x86-64-v3",
    }
    kinds = {path.suffix for path in (artefact.directory / CACHES).rglob("*") if path.is_file()}
    assert ".so" in kinds
    assert ".lock" not in kinds
    assert stated(artefact.outputs)[1] == ("float32", (24, 4), (4, 1))


def test_same_region_comes_from_the_cache(monkeypatch):
    region, artefact = built_jit(gated)
    monkeypatch.setattr(
        "diffkiln.exporters.torch_compile.build.compiled", lambda *_, **__: pytest.fail("compiled again")
    )
    assert TorchCompile().export(Lowering(region, CPU), engine_cache()).directory == artefact.directory


def test_graph_that_would_break_is_refused_unless_that_is_allowed():
    (problem,) = TorchCompile().check(attending_by_package(), CPU, {})
    assert (problem.where, problem.reason) == ("$.fullgraph", "the graph breaks at attention by flash_2")
    assert not TorchCompile().check(attending_by_package(), CPU, {"fullgraph": False})


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (L4, "this machine has no CUDA GPU"),
        (replace(CPU, name="cpu-x86-64-v4", isa="x86-64-v4"), "this machine cannot run x86-64-v4"),
    ],
)
def test_target_that_is_another_machine_is_refused(target, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    (problem,) = TorchCompile().check(gated(), target, {})
    assert reason in problem.reason
    assert target.name in problem.hint


def test_gpu_of_another_sm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "SM 9.0" in TorchCompile().check(gated(), L4, {})[0].reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert not TorchCompile().check(gated(), L4, {})


def test_unknown_option_is_refused():
    assert TorchCompile().check(gated(), CPU, {"mode": "fast"})[0].where == "$.mode"


def test_several_sizes_at_once_are_refused(tmp_path):
    small = total(8)
    (family,) = families([small, replace(total(16), name="Total-2")])
    with pytest.raises(ExportError, match="one size at a time"):
        TorchCompile().export(Lowering(small, CPU, family=family), EngineCache(tmp_path))


def test_what_stops_torch_is_told(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: stop)
    with pytest.raises(ExportError, match=r"'Gated' cannot be lowered .* RuntimeError: out of luck\. Choose another"):
        TorchCompile().export(Lowering(gated(), CPU), EngineCache(tmp_path))
