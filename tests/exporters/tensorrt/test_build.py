"""TensorRT: what an engine is built from and holds, that it is the same each time, and what is refused.

Engines are built here for a GPU that is not here. What they compute is shown by ONNX Runtime, on the very model that
they were built from.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import tensorrt_rtx
import torch

from diffkiln.bundle.tensorrt import ENGINE, FACTS, LAYERS, MODEL
from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.tensorrt import build as backend
from diffkiln.exporters.tensorrt.check import Tensorrt
from diffkiln.program import DType, Program
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.onnx.engine import OnnxEngine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec.targets import GPUS
from tests.exporters.regions import (
    CPU,
    RTX_4090,
    Writer,
    attention,
    bfloat16_block,
    block,
    built_tensorrt,
    convolution,
    engine_cache,
    float8_linear,
    holding,
    in_type,
    int8_product,
    interpreted,
    tensors,
)


def linear() -> Program:
    w = Writer()
    x, weight, bias = w.value("%x", 4, 32), w.value("@weight", 24, 32), w.value("@bias", 24)
    return w.program("Linear", w.op("linear.default", x, weight, bias))


def order(tokens: int) -> Program:
    w = Writer()
    ranks = w.op("argsort.default", w.value("%x", 1, tokens))
    return w.program("Order", w.op("to.dtype", ranks, DType("float32")))


def facts(artefact: Artefact) -> dict:
    return json.loads((artefact.directory / FACTS).read_text())


def layers(artefact: Artefact) -> list[dict]:
    return json.loads((artefact.directory / LAYERS).read_text())


def nodes_in(artefact: Artefact) -> set[str]:
    """The nodes of the model that the engine's own file names."""
    data = (artefact.directory / ENGINE).read_bytes()
    return {name.decode() for name in re.findall(rb"\[ONNX Layer: ([^\]]+)\]", data)}


class TestBuilding:
    def test_says_what_it_is_for_and_what_runs_it(self) -> None:
        _, artefact = built_tensorrt(block)
        assert {path.name for path in artefact.directory.iterdir()} == {ENGINE, MODEL, FACTS, LAYERS}
        told = facts(artefact)
        assert (told["library"], told["version"], told["sm"]) == ("tensorrt_rtx", tensorrt_rtx.__version__, "sm_89")
        assert told["bytes"] == (artefact.directory / ENGINE).stat().st_size
        assert artefact.requires == {"sm": "sm_89"}
        assert artefact.packages == {"tensorrt-rtx": f"=={tensorrt_rtx.__version__}"}

    def test_weights_and_constants_are_inputs(self) -> None:
        region, artefact = built_tensorrt(block)
        model = onnx.load(artefact.directory / MODEL)
        told = facts(artefact)
        assert told["inputs"] == [value.name for value in model.graph.input]
        assert len(told["inputs"]) == 1 + len(region.weights) + len(region.constants) == len(artefact.inputs)
        assert told["outputs"] == [value.name for value in model.graph.output]
        assert not told["holds_weights"]

    @pytest.mark.parametrize("make", [block, convolution])
    def test_model_that_it_was_built_from_gives_what_the_region_gives(self, make) -> None:
        region, artefact = built_tensorrt(make)
        run = OnnxEngine(artefact.directory, artefact.inputs)
        constants = {"gate": torch.rand(16, 1)}
        assert self_test(run, region, constants, torch.device("cpu"), "the model") < 1e-4

    @pytest.mark.parametrize("make", [block, convolution])
    def test_every_operation_of_the_model_is_in_the_engine(self, make) -> None:
        _, artefact = built_tensorrt(make)
        model = onnx.load(artefact.directory / MODEL)
        named = {row["name"] for row in layers(artefact) if row["operator"]}
        assert nodes_in(artefact) == named <= {node.name for node in model.graph.node}
        heavy = {node.name for node in model.graph.node if node.op_type in ("MatMul", "Conv", "Softmax", "Gelu")}
        assert heavy
        assert heavy <= named

    def test_layers_say_which_operator_they_come_from(self) -> None:
        _, artefact = built_tensorrt(block)
        kinds = {(row["kind"], row["operator"]) for row in layers(artefact)}
        assert ("NORMALIZATION", "aten.layer_norm.default") in kinds
        assert ("MATRIX_MULTIPLY", "aten.linear.default") in kinds

    def test_computes_in_the_types_of_the_region_and_no_other(self) -> None:
        _, artefact = built_tensorrt(bfloat16_block)
        found = {dtype for row in layers(artefact) for dtype, _ in row["outputs"]}
        assert found <= {"BF16", "INT64", "INT32"}
        assert "BF16" in found

    def test_engine_names_no_place_of_this_machine(self) -> None:
        _, artefact = built_tensorrt(block)
        for path in artefact.directory.iterdir():
            assert b"/tmp" not in path.read_bytes()

    def test_second_export_builds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        region, artefact = built_tensorrt(block)
        monkeypatch.setattr(backend, "build", None)
        assert Tensorrt().export(Lowering(region, RTX_4090), engine_cache()) == artefact

    def test_one_profile_for_a_family_of_sizes(self) -> None:
        (family,) = families([attention(tokens) for tokens in (16, 24, 40)])
        artefact = Tensorrt().export(Lowering(family.members[0], RTX_4090, family=family), engine_cache())
        results = [shape for row in layers(artefact) for _, shape in row["outputs"]]
        assert any(-1 in shape for shape in results)
        run = OnnxEngine(artefact.directory, artefact.inputs)
        for member in family.members:
            torch.testing.assert_close(run(tensors(member)), interpreted(member, tensors(member)))


class TestHoldingWeights:
    def test_takes_the_region_s_inputs_alone_and_the_model_still_takes_all(self) -> None:
        region = linear()
        artefact = Tensorrt().export(holding(region), engine_cache())
        told = facts(artefact)
        assert [bool(name) for name in told["inputs"]] == [True, False, False]
        assert told["holds_weights"]
        assert told["weight_budget"] is None  # they fit
        assert len(onnx.load(artefact.directory / MODEL).graph.input) == len(artefact.inputs) == 3
        assert tensors(region)[2].numpy().tobytes() in (artefact.directory / ENGINE).read_bytes()

    def test_other_weights_are_another_engine_and_the_budget_is_what_the_spec_says(self) -> None:
        first = Tensorrt().export(holding(linear()), engine_cache())
        second = Tensorrt().export(holding(linear(), 1, weight_budget=1000), engine_cache())
        assert first.directory != second.directory
        assert facts(second)["weight_budget"] == 1000

    def test_budget_is_what_the_memory_allows_where_the_spec_says_nothing(self) -> None:
        total = (24 * 32 + 24) * 4
        assert backend._budget(holding(linear())) is None
        assert backend._budget(holding(linear(), target=replace(RTX_4090, memory_bytes=total))) == total * 3 // 4
        assert backend._budget(holding(linear(), weight_budget=total)) is None

    def test_missing_weight_is_named(self, tmp_path: Path) -> None:
        lowering = replace(holding(linear()), weights={})
        with pytest.raises(ExportError, match="to hold its weights, and weight is not given"):
            Tensorrt().export(lowering, EngineCache(tmp_path))


class TestRefusing:
    def test_operation_that_the_parser_cannot_take_is_named_with_its_operator(self, tmp_path: Path) -> None:
        with pytest.raises(
            ExportError,
            match=r"'Int8Product' cannot be lowered by tensorrt: TensorRT for RTX [\d.]+ cannot take MatMulInteger "
            r"\(node__int_mm\), which comes from aten\._int_mm\.default",
        ):
            Tensorrt().export(Lowering(int8_product(), RTX_4090), EngineCache(tmp_path))

    def test_range_of_sizes_that_an_operator_cannot_take(self, tmp_path: Path) -> None:
        (family,) = families([order(tokens) for tokens in (16, 8192)])
        with pytest.raises(ExportError) as caught:
            Tensorrt().export(Lowering(family.members[0], RTX_4090, family=family), EngineCache(tmp_path))
        told = str(caught.value)
        assert "sizes found 16 to 8192 in dimension 1 of flat_0, required a range that it takes" in told
        assert "exceeds the maximum value allowed (3840)" in told
        assert "which comes from aten.sort.default" in told

    @pytest.mark.parametrize(
        ("region", "target", "reason"),
        [
            (float8_linear(), RTX_4090, r"found float8_e4m3fn, required one of float32, .* \(weight of Float8Linear\)"),
            (in_type(block(), "float64"), RTX_4090, "found float64, required one of float32"),
            (in_type(block(), "bfloat16"), GPUS["nvidia-t4"], r"found bfloat16 for compute capability 7\.5, required"),
            (block(), replace(RTX_4090, compute_capability="7.0"), r"found compute capability 7\.0 .*, required 7\.5"),
            (block(), CPU, "builds for NVIDIA's GPUs, the target is cpu-x86-64-v3"),
        ],
    )
    def test_types_and_targets_with_found_against_required(self, tmp_path: Path, region, target, reason) -> None:
        with pytest.raises(ExportError, match=reason):
            Tensorrt().export(Lowering(region, target), EngineCache(tmp_path))

    def test_unknown_option(self) -> None:
        (problem,) = Tensorrt().check(block(), RTX_4090, {"level": 3})
        assert "$.level" in str(problem)

    @pytest.mark.parametrize(
        ("module", "target", "reason"),
        [
            ("tensorrt_rtx", RTX_4090, r"found no package tensorrt-rtx.*pip install 'diffkiln\[tensorrt\]'"),
            ("tensorrt", GPUS["nvidia-h200"], r"found no package tensorrt, .*pip install tensorrt$"),
        ],
    )
    def test_missing_library_is_named_with_what_installs_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, target, reason: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependency, match=reason):
            Tensorrt().export(Lowering(block(), target), EngineCache(tmp_path))

    def test_tensorrt_builds_on_the_gpu_that_it_builds_for_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(
            ExportError, match=r"found no CUDA GPU, required sm_90 \(nvidia-h200\), since TensorRT times"
        ):
            Tensorrt().export(Lowering(block(), GPUS["nvidia-h200"]), EngineCache(tmp_path))
