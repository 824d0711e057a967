"""OpenVINO: what an engine holds, that it is the same each time, that it is compared, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffkiln.bundle.openvino import FACTS, MODEL, WEIGHTS, Facts
from diffkiln.errors import ExportError, MissingDependency
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.openvino import build as backend
from diffkiln.exporters.openvino import comparing
from diffkiln.exporters.openvino.check import Openvino
from diffkiln.program import Program
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.openvino import PLUGIN
from tests.exporters.regions import (
    Writer,
    attention,
    block,
    built_openvino,
    convolution,
    engine_cache,
    gated,
    given,
    int8_linear,
    interpreted,
    tensors,
    total,
)

INT64_MAX = 2**63 - 1


def to_the_end() -> Program:
    """A slice that ends where torch says that all do: at the last int64."""
    w = Writer()
    x = w.op("slice.Tensor", w.value("%x", 1, 8, 4), 1, 2, INT64_MAX)
    return w.program("ToTheEnd", w.op("mul.Tensor", x, w.value("@scale", 4)))


class TestBuilding:
    @pytest.mark.parametrize("weights", ["engine", "input"])
    @pytest.mark.parametrize("make", [block, convolution, int8_linear, to_the_end])
    def test_gives_what_the_region_gives(self, make, weights) -> None:
        region, artefact = built_openvino(make, weights)
        run = PLUGIN(artefact.directory, artefact.inputs)
        flat = tensors(region)
        for _ in range(2):  # as it was compiled, and as a later load finds it
            for found, wanted in zip(run(flat), interpreted(region, flat), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            run = PLUGIN(artefact.directory, artefact.inputs)

    def test_weights_and_constants_are_in_the_engine_or_among_its_inputs(self) -> None:
        region, held = built_openvino(block)
        _, lent = built_openvino(block, "input")
        size = 4 * sum(tensor.numel() for tensor in tensors(region)[1:])
        assert {path.name for path in held.directory.iterdir()} == {MODEL, WEIGHTS, FACTS}
        assert size <= (held.directory / WEIGHTS).stat().st_size < size + 1000
        assert (lent.directory / WEIGHTS).stat().st_size < 1000
        facts = [Facts.model_validate_json((item.directory / FACTS).read_bytes()) for item in (held, lent)]
        assert [facts.weights for facts in facts] == ["engine", "input"]
        assert [sum(name is not None for name in facts.inputs) for facts in facts] == [1, 1 + len(region.weights)]

    def test_same_bytes_every_time(self, tmp_path: Path) -> None:
        _, first = built_openvino(block)
        Openvino().export(given(gated(), weights="engine"), EngineCache(tmp_path / "other"))  # counts on nothing before
        again = Openvino().export(given(block(), weights="engine"), EngineCache(tmp_path / "cache"))
        for name in (MODEL, WEIGHTS, FACTS):
            assert (first.directory / name).read_bytes() == (again.directory / name).read_bytes()

    def test_other_weights_are_another_engine(self) -> None:
        _, first = built_openvino(gated)
        lowering = given(gated(), weights="engine")
        others = {name: tensor * 2 for name, tensor in lowering.weights.items()}
        again = Openvino().export(replace(lowering, weights=others), engine_cache())
        assert again.directory != first.directory

    def test_says_what_runs_it_and_names_no_place(self) -> None:
        _, artefact = built_openvino(gated)
        told = json.loads((artefact.directory / FACTS).read_text())
        assert artefact.packages == Openvino.packages == {"openvino": f"=={told['version']}"}
        assert str(Path.cwd()).encode() not in (artefact.directory / MODEL).read_bytes()


def wide() -> Program:
    """Two layers whose rows are groups of 128 and of 64. In ONNX an operation of its own transposes their weights."""
    w = Writer()
    inner = w.op("linear.default", w.value("%x", 2, 8, 128), w.value("@first", 192, 128))
    return w.program("Wide", w.op("linear.default", w.op("gelu.default", inner), w.value("@second", 128, 192)))


class TestCompressing:
    @pytest.mark.parametrize(("options", "most", "error"), [
        ({"weight_format": "int8"}, 0.3, 0.03),
        ({"weight_format": "int4"}, 0.27, 0.2),
        ({"weight_format": "int4", "group_size": 32}, 0.27, 0.2),
    ])  # fmt: skip
    def test_weights_are_smaller_and_nearly_the_same(self, options, most, error, tmp_path: Path, capfd) -> None:
        lowering = given(wide(), weights="engine", **options)
        artefact = Openvino().export(lowering, EngineCache(tmp_path))
        size = 4 * sum(tensor.numel() for tensor in lowering.weights.values())
        assert (artefact.directory / WEIGHTS).stat().st_size < most * size
        facts = Facts.model_validate_json((artefact.directory / FACTS).read_bytes())
        assert facts.weight_format == options["weight_format"]
        flat = tensors(lowering.region)
        (found,), (wanted,) = PLUGIN(artefact.directory, artefact.inputs)(flat), interpreted(lowering.region, flat)
        assert 0 < (found - wanted).norm() / wanted.norm() < error
        assert capfd.readouterr().out == ""  # NNCF draws bars

    def test_same_bytes_every_time(self, tmp_path: Path) -> None:
        lowering = given(wide(), weights="engine", weight_format="int4")
        first, again = (Openvino().export(lowering, EngineCache(tmp_path / name)) for name in ("one", "two"))
        for name in (MODEL, WEIGHTS, FACTS):
            assert (first.directory / name).read_bytes() == (again.directory / name).read_bytes()

    def test_a_graph_that_is_wrong_before_weights_are_compressed(self, monkeypatch, tmp_path: Path) -> None:
        replayed = comparing._replayed
        monkeypatch.setattr(comparing, "_replayed", lambda *args: [tensor / 0.99 for tensor in replayed(*args)])
        with pytest.raises(ExportError, match=r"differs from the replay by 1\.0e-02"):
            Openvino().export(given(wide(), weights="engine", weight_format="int4"), EngineCache(tmp_path))

    def test_no_usage_is_reported(self) -> None:
        code = (
            "import sys; from diffkiln.exporters.openvino import compressing as c; c._imported(); print(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "nncf" in done.stdout.split()
        assert "openvino_telemetry" not in done.stdout.split()

    def test_without_nncf(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "nncf", None)
        with pytest.raises(MissingDependency, match=r"pip install 'diffkiln\[nncf\]'"):
            Openvino().export(given(wide(), weights="engine", weight_format="int8"), EngineCache(tmp_path))


class TestRefusing:
    def test_weights_that_are_not_given(self) -> None:
        with pytest.raises(ExportError, match="is to hold its weights, and weight is not given"):
            Openvino().export(replace(given(gated(), weights="engine"), weights={}), engine_cache())

    def test_several_sizes(self) -> None:
        (family,) = families([attention(8), attention(12)])
        lowering = replace(given(attention(8), weights="input"), family=family)
        with pytest.raises(ExportError, match="compiled for one size"):
            Openvino().export(lowering, engine_cache())

    def test_an_operator_without_a_form_in_onnx(self) -> None:
        with pytest.raises(ExportError, match=r"cannot be lowered by openvino: .*aten\.amax\.default"):
            Openvino().export(given(total(), weights="engine"), engine_cache())

    def test_what_openvino_cannot_read_names_the_operator_it_comes_from(self, tmp_path: Path) -> None:
        class Reader:
            def read_model(self, path: Path) -> None:
                raise RuntimeError("Check failed\nnode_Gelu_3: no such operation.\n")

        class Module:
            Core = Reader

        written = backend.Written((), (), {"node_Gelu_3": "aten.gelu.default"})
        with pytest.raises(ExportError, match=r"no such operation \(it comes from aten\.gelu\.default\)\. Compile"):
            backend._read(Module, tmp_path, written)

    def test_an_engine_that_differs_from_its_replay(self, monkeypatch, tmp_path: Path) -> None:
        replayed = comparing._replayed
        monkeypatch.setattr(comparing, "_replayed", lambda *args: [tensor / 0.99 for tensor in replayed(*args)])
        with pytest.raises(ExportError, match=r"output 0 of OpenVINO's engine differs from the replay by 1\.0e-02"):
            Openvino().export(given(gated(), weights="engine"), EngineCache(tmp_path))

    def test_an_engine_that_a_later_load_would_find_changed(self, monkeypatch, tmp_path: Path) -> None:
        """OpenVINO 2026.4 reads the last int64 as -1 then; once it no longer does, `_clamp` may go."""
        monkeypatch.setattr(backend, "_clamp", lambda *_: None)
        with pytest.raises(ExportError, match="differs from itself, once it was compiled and kept by inf"):
            Openvino().export(given(to_the_end(), weights="engine"), EngineCache(tmp_path))

    def test_without_openvino(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(MissingDependency, match=r"pip install 'diffkiln\[openvino\]'"):
            backend._imported()
