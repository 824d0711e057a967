"""ONNX Runtime on torch's tensors: bound where they are, any thread, any size; damaged and hostile files refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from diffkiln.errors import DiffkilnError, Incompatible, Incomplete, MissingDependency, PathEscape, VerifyError
from diffkiln.program import Program
from diffkiln.runtime.engines import engine
from diffkiln.runtime.engines.onnx.engine import MODEL, OnnxEngine, _providers
from diffkiln.runtime.engines.onnx.files import check_files
from tests.exporters.regions import block, built_onnx, int8_linear, interpreted, tensors


def loaded(make: Callable[[], Program] = block) -> tuple[Program, OnnxEngine]:
    region, artefact = built_onnx(make)
    return region, OnnxEngine(artefact.directory, artefact.inputs)


def damaged(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy of the block's engine with other bytes."""
    _, artefact = built_onnx(block)
    (folder / MODEL).write_bytes(change((artefact.directory / MODEL).read_bytes()))
    return folder


def outside(location: str, **more: str) -> onnx.TensorProto:
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_of(tensor: onnx.TensorProto) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    return helper.make_graph([helper.make_node("Add", ["x", "far"], ["y"])], "g", [x], [y], [tensor])


def as_initializer(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return graph_of(tensor)


def as_attribute(tensor: onnx.TensorProto) -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [y])


def in_a_branch(tensor: onnx.TensorProto) -> onnx.GraphProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    branch = as_attribute(tensor)
    return helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], "g", [c], [y]
    )


def written(folder: Path, graph: onnx.GraphProto) -> Path:
    (folder / MODEL).write_bytes(helper.make_model(graph).SerializeToString())
    return folder / MODEL


class TestRunning:
    @pytest.mark.parametrize("make", [block, int8_linear])
    def test_gives_what_the_region_gives(self, make: Callable[[], Program]) -> None:
        region, run = loaded(make)
        flat = tensors(region)
        run.check(flat)
        for found, wanted in zip(run(flat), interpreted(region, flat), strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 1e-5
            assert found.is_contiguous()

    def test_weights_are_looked_at_in_every_call(self) -> None:
        region, run = loaded()
        first, second = tensors(region, 1), tensors(region, 2)
        for weights in (first, second, first):
            flat = [first[0], *weights[1:]]
            torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0], rtol=1e-5, atol=1e-5)

    def test_takes_parameters_views_and_what_is_not_contiguous_and_leaves_them_alone(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        wanted = run(flat)[0]
        apart = flat[0].transpose(1, 2).contiguous().transpose(1, 2)
        given = [apart, *(torch.nn.Parameter(tensor) for tensor in flat[1:])]
        copies = [tensor.detach().clone() for tensor in given]
        assert torch.equal(run(given)[0], wanted)
        assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))

    def test_binds_tensors_where_they_lie(self) -> None:
        region, run = loaded()
        bound: list[int] = []
        bind = run._bind
        run._bind = lambda method, name, tensor: (bound.append(tensor.data_ptr()), bind(method, name, tensor))  # type: ignore[method-assign]
        flat = tensors(region)
        outputs = run(flat)
        assert bound == [tensor.data_ptr() for tensor in (*flat, *outputs)]

    def test_same_bits_every_time(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        wanted = [tensor.clone() for tensor in run(flat)]
        again = loaded()[1]
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(again(flat), wanted, strict=True))

    def test_several_threads_may_call_one_engine(self) -> None:
        region, run = loaded()
        many = [tensors(region, seed) for seed in range(8)]
        wanted = [run(flat)[0] for flat in many]
        with ThreadPoolExecutor(4) as pool:
            for found, want in zip(pool.map(lambda flat: run(flat)[0], many), wanted, strict=True):
                assert torch.equal(found, want)

    @pytest.mark.parametrize("count", [1, 3])
    def test_has_as_many_threads_as_torch(self, count: int) -> None:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(count)
            region, run = loaded()
            assert run._session.get_session_options().intra_op_num_threads == count
            torch.testing.assert_close(run(tensors(region)), interpreted(region, tensors(region)))
        finally:
            torch.set_num_threads(threads)

    def test_check_says_what_differs(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        with pytest.raises(VerifyError, match="input 0: dtype float64 found, float32 required"):
            run.check([flat[0].double(), *flat[1:]])

    def test_registered(self) -> None:
        assert engine("onnx") is OnnxEngine

    def test_runs_in_a_process_without_onnx_or_compilers(self, tmp_path: Path) -> None:
        region, artefact = built_onnx(block)
        torch.save(tensors(region), tmp_path / "flat.pt")
        script = f"""
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from diffkiln.runtime.engines import engine
layouts = [SimpleNamespace(**row) for row in json.loads(sys.argv[1])]
run = engine("onnx")(Path({str(artefact.directory)!r}), layouts)
print(run(torch.load({str(tmp_path / "flat.pt")!r}))[0].double().sum().item())
assert not {{"onnx", "onnxscript", "diffkiln.exporters", "torch._inductor"}} & set(sys.modules)
"""
        layouts = json.dumps([spec.model_dump(mode="json") for spec in artefact.inputs])
        done = subprocess.run([sys.executable, "-c", script, layouts], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        wanted = interpreted(region, tensors(region))[0].double().sum().item()
        assert float(done.stdout) == pytest.approx(wanted, abs=1e-3)


class TestRefusing:
    def test_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(Incomplete, match=r"engine\.onnx is missing"):
            OnnxEngine(tmp_path, ())

    @pytest.mark.parametrize("left", [0.999, 0.5, 0.01])
    def test_model_that_is_cut_short(self, tmp_path: Path, left: float) -> None:
        damaged(tmp_path, lambda data: data[: int(len(data) * left)])
        with pytest.raises(Incomplete, match=r"cut short or damaged: found \d+ bytes of a field, required \d+"):
            OnnxEngine(tmp_path, ())

    @pytest.mark.parametrize("data", [b"", b"not a model", b"\xff" * 64, b"<html></html>"])
    def test_what_is_no_model(self, tmp_path: Path, data: bytes) -> None:
        damaged(tmp_path, lambda _: data)
        with pytest.raises(DiffkilnError, match=r"engine\.onnx: "):
            OnnxEngine(tmp_path, ())

    def test_operators_of_libraries_that_are_never_loaded(self, tmp_path: Path) -> None:
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
        node = helper.make_node("Evil", ["x"], ["y"], domain="custom.library")
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("custom.library", 1)]
        model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10)
        (tmp_path / MODEL).write_bytes(model.SerializeToString())
        with pytest.raises(Incompatible, match="cannot load the engine"):
            OnnxEngine(tmp_path, ())

    def test_other_number_of_inputs(self) -> None:
        _, artefact = built_onnx(block)
        with pytest.raises(Incompatible, match="found 12 inputs, required 1"):
            OnnxEngine(artefact.directory, artefact.inputs[:1])

    def test_device_without_a_provider(self) -> None:
        with pytest.raises(
            Incompatible, match=r"found CPUExecutionProvider, required CUDAExec.*pip install onnxruntime-gpu"
        ):
            _providers(["CPUExecutionProvider"], torch.device("cuda"))
        with pytest.raises(Incompatible, match="required mps"):
            _providers(["CPUExecutionProvider"], torch.device("mps"))

    def test_gpu_comes_before_the_cpu(self) -> None:
        available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        assert _providers(available, torch.device("cpu")) == ["CPUExecutionProvider"]
        chosen = _providers(available, torch.device("cuda:1"))
        assert chosen == [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]

    def test_without_onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingDependency, match="pip install onnxruntime"):
            loaded()


class TestExternalData:
    @pytest.mark.parametrize("place", [as_initializer, as_attribute, in_a_branch])
    @pytest.mark.parametrize(
        "location", ["../far.bin", "/etc/passwd", "a/../../far.bin", "C:\\far.bin", "..\\far.bin", "", "far\0.bin"]
    )
    def test_outside_the_folder_is_refused_before_it_is_opened(
        self, tmp_path: Path, place: Callable[[onnx.TensorProto], onnx.GraphProto], location: str
    ) -> None:
        folder = tmp_path / "engine"
        folder.mkdir()
        (tmp_path / "far.bin").write_bytes(bytes(16))
        with pytest.raises(PathEscape, match=r"external data found at .*, required a file in the model's own folder"):
            check_files(written(folder, place(outside(location))))

    def test_link_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "engine"
        folder.mkdir()
        (tmp_path / "far.bin").write_bytes(bytes(16))
        (folder / "far.bin").symlink_to(tmp_path / "far.bin")
        (folder / "sub").symlink_to(tmp_path)
        for location in ("far.bin", "sub/far.bin"):
            with pytest.raises(PathEscape, match="which is a link"):
                check_files(written(folder, as_initializer(outside(location))))

    def test_missing_and_short_files(self, tmp_path: Path) -> None:
        model = written(tmp_path, as_initializer(outside("far.bin", offset="4", length="16")))
        with pytest.raises(Incomplete, match=r"far\.bin is missing"):
            check_files(model)
        (tmp_path / "far.bin").write_bytes(bytes(16))
        with pytest.raises(Incomplete, match="found 16 bytes, required 20"):
            check_files(model)
        (tmp_path / "far.bin").write_bytes(bytes(20))
        check_files(model)

    def test_length_that_is_no_number(self, tmp_path: Path) -> None:
        (tmp_path / "far.bin").write_bytes(bytes(16))
        with pytest.raises(Incompatible, match="length of external data: found '-1'"):
            check_files(written(tmp_path, as_initializer(outside("far.bin", length="-1"))))

    def test_deep_nesting_ends(self, tmp_path: Path) -> None:
        graph = b""
        for _ in range(5000):  # graph ⊃ node ⊃ attribute ⊃ graph
            for tag in (6 << 3 | 2, 5 << 3 | 2, 1 << 3 | 2):
                graph = bytes([tag]) + _length(len(graph)) + graph
        (tmp_path / MODEL).write_bytes(bytes([7 << 3 | 2]) + _length(len(graph)) + graph)
        with pytest.raises(Incomplete, match="nested more than 100 deep"):
            check_files(tmp_path / MODEL)

    def test_good_model_passes(self, tmp_path: Path) -> None:
        _, artefact = built_onnx(block)
        shutil.copy(artefact.directory / MODEL, tmp_path)
        check_files(tmp_path / MODEL)


def _length(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
