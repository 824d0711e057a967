"""Engines for a GPU that is not there beyond blocks: whole components, what lies between, ranges, quantized blocks."""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import IllegalPlan, Incompatible
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.program import Program
from diffkiln.program.sizes import Family
from diffkiln.spec import TARGETS
from tests.cross import parts
from tests.cross.test_engines import library
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.cross, *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS)]
L4 = TARGETS["nvidia-l4"]

#: The product that a type is computed by, where it is one of torch's own for it.
PRODUCTS = {"int8_dynamic": b"_int_mm", "float8_dynamic": b"_scaled_mm"}


def exported(region: Program, family: Family | None = None) -> Artefact:
    artefact = AotInductor().export(Lowering(region, L4, family=family), engine_cache())
    assert {cubin.sm for cubin in cubins_of(library(artefact))} == {"sm_89"}
    assert artefact.autotuned is False
    # A call that torch has no C entry for would go through its dispatcher, and be described in a file of its own.
    assert not list(artefact.directory.rglob("engine.json"))
    return artefact


@pytest.mark.parametrize("name", parts.PARTS)
def test_a_part_of_the_pipeline_is_built(name: str) -> None:
    region = parts.part(name)
    artefact = exported(region)
    assert len(artefact.inputs) == len(region.inputs) + len(region.weights) + len(region.constants)


@pytest.mark.parametrize("kind", parts.QUANTIZED)
def test_a_quantized_block_is_built(kind: str) -> None:
    region = parts.quantized(kind)
    artefact = exported(region)
    assert {spec.dtype for spec in artefact.inputs} & {"int8", "uint8", "float8_e4m3fn"}
    assert PRODUCTS.get(kind, b"") in library(artefact).read_bytes()


def test_four_bits_of_bitsandbytes_are_refused_for_a_gpu_too() -> None:
    quantize = {"name": "quantize", "component": "transformer", "backend": "bitsandbytes", "type": "nf4"}
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[1\]: compile cannot follow quantize: bitsandbytes.*torchao"):
        diffkiln.check(parts.flux([quantize, {"name": "compile", "component": "transformer"}]))


@pytest.mark.parametrize("component", ["transformer", "scheduler"])
def test_sizes_of_a_range_share_an_engine(component: str) -> None:
    family = parts.ranged(component)
    artefact = exported(family.members[0], family)
    assert {(spec.dtype, spec.shape) for spec in artefact.outputs} == {
        (family.members[0].types[ref.name].dtype, family.members[0].types[ref.name].shape)
        for ref in family.members[0].outputs
    }


def test_a_bundle_for_two_gpus_says_what_it_holds_and_why_it_is_not_used_here(tmp_path, capsys) -> None:
    from diffkiln.cli import main

    gpus = [{"device": "cuda", "gpu": name} for name in ("nvidia-l4", "nvidia-h200")]
    spec = parts.flux([{"name": "compile", "component": "scheduler"}], target=gpus)
    built = diffkiln.compile(spec, tmp_path / "bundle", cache=engine_cache())
    with open_bundle(built.path) as bundle:
        manifest = bundle.manifest
    assert manifest.runtime["gpus"] == {
        "nvidia-l4": {"sm": "sm_89", "autotuned": False},
        "nvidia-h200": {"sm": "sm_90a", "autotuned": False},
    }
    assert any("retune" in notice for notice in built.notices)
    files = [row.path for row in manifest.files if row.role == "weights"]
    assert len(files) == len(set(files)) == sum(len(groups) for groups in manifest.weights.values())
    assert main(["inspect", str(built.path)]) == 0
    told = capsys.readouterr().out
    assert "nvidia-l4" in told
    assert "found no CUDA GPU, required sm_90a" in told
    with pytest.raises(Incompatible, match=r"^gpu: found none.*nvidia-l4 \(sm_89\), nvidia-h200 \(sm_90a\)"):
        diffkiln.load(built.path)


def test_a_bundle_for_a_gpu_and_a_cpu_runs_on_the_cpu_where_there_is_no_gpu(tmp_path, capsys) -> None:
    from diffkiln.cli import main

    machines = [{"device": "cuda", "gpu": "nvidia-l4"}, {"device": "cpu"}]
    spec = parts.flux([{"name": "compile", "component": "scheduler"}], target=machines)
    built = diffkiln.compile(spec, tmp_path / "bundle", cache=engine_cache())

    def drawn() -> torch.Tensor:
        with diffkiln.load(built.path) as pipe:
            assert pipe.executor.device == torch.device("cpu")
            assert pipe.executor.engines
            return pipe("a red fox", generator=torch.Generator().manual_seed(1), output_type="pt").images

    first = drawn()
    assert main(["inspect", str(built.path)]) == 0
    told = capsys.readouterr().out
    assert "cpu-x86-64-v3 is used here" in told
    assert "device: found cpu, required cuda" in told
    diffkiln.strip(built.path, "nvidia-l4")
    with open_bundle(built.path) as bundle:
        assert bundle.manifest.runtime["device"] == "cpu"
        assert not {"devices", "gpus"} & bundle.manifest.runtime.keys()
    torch.testing.assert_close(drawn(), first, rtol=0, atol=0)
