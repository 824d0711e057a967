"""ONNX: what is exported, that it is the same each time, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import onnx
import pytest
import torch

from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters._onnx import writing as backend
from diffkiln.exporters._onnx.writing import DATA, MODEL, OPSET
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.program import Program
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.onnx.engine import NUMBERS, OnnxEngine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec.targets import Target
from tests.exporters.regions import (
    CPU,
    Writer,
    attention,
    block,
    built_onnx,
    engine_cache,
    float8_linear,
    float16_block,
    in_type,
    int8_linear,
    int8_product,
    interpreted,
    stated,
    tensors,
)


def spectrum() -> Program:
    w = Writer()
    x = w.value("%x", 8, 8)
    return w.program("Spectrum", w.op("view_as_real.default", w.op("fft_fft2.default", x)))


def search() -> Program:
    w = Writer()
    return w.program("Search", w.op("searchsorted.Tensor", w.value("%edges", 8), w.value("%x", 8)))


def quotient() -> Program:
    """A division that only its epsilon keeps from being one by zero, as in linear attention."""
    w = Writer()
    x = w.value("%x", 4, 8)
    below = w.op("add.Tensor", w.op("relu.default", w.op("neg.default", w.op("abs.default", x))), 1e-15)
    return w.program("Quotient", w.op("div.Tensor", x, below))


class TestBuilding:
    def test_weights_and_constants_are_inputs_and_the_file_holds_the_graph_alone(self) -> None:
        region, artefact = built_onnx(block)
        model = onnx.load(artefact.directory / MODEL)
        assert [path.name for path in artefact.directory.iterdir()] == [MODEL]
        assert len(model.graph.input) == 1 + len(region.weights) + len(region.constants) == len(artefact.inputs)
        for value, spec in zip(model.graph.input, artefact.inputs, strict=True):
            kind = value.type.tensor_type
            assert kind.elem_type == NUMBERS[spec.dtype]
            assert tuple(dim.dim_value for dim in kind.shape.dim) == spec.shape
        assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 1000

    def test_passes_the_checker_and_shape_inference_with_the_pinned_operators(self) -> None:
        _, artefact = built_onnx(block)
        model = onnx.load(artefact.directory / MODEL)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        assert {(item.domain, item.version) for item in model.opset_import} == {("", OPSET)}

    def test_outputs_are_contiguous(self) -> None:
        _, artefact = built_onnx(block)
        assert [strides for _, _, strides in stated(artefact.outputs)] == [(512, 32, 1), (512, 16, 1)]

    def test_same_region_same_bytes_and_no_trace_of_where_it_was_made(self, tmp_path: Path) -> None:
        region, artefact = built_onnx(block)
        again = Onnx().export(Lowering(region, CPU), EngineCache(tmp_path))
        data = (artefact.directory / MODEL).read_bytes()
        assert (again.directory / MODEL).read_bytes() == data
        for trace in (b"torch", b"/tmp", b".py", b"aten", metadata.version("onnxscript").encode()):
            assert trace not in data.replace(b"diffkiln", b"")

    def test_second_export_exports_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        region, artefact = built_onnx(block)
        monkeypatch.setattr(backend, "write_model", None)
        assert Onnx().export(Lowering(region, CPU), engine_cache()) == artefact

    @pytest.mark.parametrize("make", [int8_linear, int8_product, float8_linear, float16_block])
    def test_quantized_and_narrow_types(self, make: Callable[[], Program]) -> None:
        region, artefact = built_onnx(make)
        constants = {"gate": torch.rand(16, 1, dtype=torch.float16)}
        run = OnnxEngine(artefact.directory, artefact.inputs)
        assert self_test(run, region, constants, torch.device("cpu"), "the engine") < 2e-3

    def test_small_numbers_are_not_taken_for_zero(self) -> None:
        region, artefact = built_onnx(quotient)
        flat = tensors(region)
        torch.testing.assert_close(OnnxEngine(artefact.directory, artefact.inputs)(flat), interpreted(region, flat))

    def test_one_engine_for_a_family_of_sizes(self) -> None:
        (family,) = families([attention(tokens) for tokens in (16, 24, 40)])
        artefact = Onnx().export(Lowering(family.members[0], CPU, family=family), engine_cache())
        model = onnx.load(artefact.directory / MODEL)
        assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_param
        run = OnnxEngine(artefact.directory, artefact.inputs)
        for member in family.members:
            for _ in range(2):  # the first run shows the shapes
                torch.testing.assert_close(run(tensors(member)), interpreted(member, tensors(member)))

    def test_what_does_not_fit_a_protobuf_lies_beside_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "_LIMIT", 10)
        artefact = Onnx().export(Lowering(block(), CPU), EngineCache(tmp_path))
        assert sorted(path.name for path in artefact.directory.iterdir()) == [MODEL, DATA]
        flat = tensors(block())
        torch.testing.assert_close(
            OnnxEngine(artefact.directory, artefact.inputs)(flat), interpreted(block(), flat), rtol=1e-5, atol=1e-5
        )


class TestRefusing:
    def test_operator_that_torch_cannot_translate_is_named_with_the_region(self, tmp_path: Path) -> None:
        with pytest.raises(
            ExportError, match=r"'Search' cannot be lowered by onnx: .*operator for aten\.searchsorted.*aot_inductor"
        ):
            Onnx().export(Lowering(search(), CPU), EngineCache(tmp_path))

    def test_bfloat16_and_complex_numbers_with_found_against_required(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"found aten\.layer_norm\.default in bfloat16, required float32"):
            Onnx().export(Lowering(in_type(block(), "bfloat16"), CPU), EngineCache(tmp_path))
        with pytest.raises(ExportError, match=r"found aten\.fft_fft2\.default of complex numbers, required one of"):
            Onnx().export(Lowering(spectrum(), CPU), EngineCache(tmp_path))

    def test_options_and_calls(self) -> None:
        reasons = "\n".join(map(str, Onnx().check(block(), CPU, {"level": 3})))
        assert "$.level" in reasons

    def test_takes_gpus(self) -> None:
        assert not Onnx().check(block(), Target("l4", "cuda", compute_capability="8.9"), {})

    def test_model_that_the_checker_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise onnx.checker.ValidationError("no such field\nmore")

        monkeypatch.setattr(onnx.checker, "check_model", refuse)
        with pytest.raises(ExportError, match=r"'Int8Linear'.*onnx\.checker refuses .*: no such field\. Choose"):
            Onnx().export(Lowering(int8_linear(), CPU), EngineCache(tmp_path))

    def test_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        with pytest.raises(MissingDependency, match=r"needs onnx: pip install 'diffkiln\[onnx\]'"):
            Onnx().export(Lowering(block(), CPU), EngineCache(tmp_path))
