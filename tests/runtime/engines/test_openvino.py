"""OpenVINO on torch's tensors: bound where they are, any thread, any process; what it compiled is kept for one CPU."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch

from diffkiln.bundle.openvino import FACTS, MODEL, WEIGHTS
from diffkiln.bundle.state import state_dir
from diffkiln.errors import Incompatible, Incomplete, ManifestInvalid, MissingDependency, VerifyError
from diffkiln.program import Program
from diffkiln.runtime.engines import engine, holds_weights
from diffkiln.runtime.engines.openvino import engine as module
from diffkiln.runtime.engines.openvino.engine import OpenvinoEngine
from tests.exporters.regions import block, built_openvino, convolution, interpreted, tensors


def loaded(make: Callable[[], Program] = block, weights: str = "engine") -> tuple[Program, OpenvinoEngine]:
    region, artefact = built_openvino(make, weights)
    return region, OpenvinoEngine(artefact.directory, artefact.inputs)


def changed(folder: Path, **facts: object) -> tuple[Path, tuple]:
    """A copy of the block's engine that says other things of itself."""
    _, artefact = built_openvino(block)
    shutil.copytree(artefact.directory, folder, dirs_exist_ok=True)
    told = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(told | facts))
    return folder, artefact.inputs


@pytest.fixture
def own_state(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return state_dir("kernels")


class TestRunning:
    def test_weights_that_it_holds_are_not_looked_at(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        assert holds_weights(run)
        given = [flat[0], *(torch.empty(0) for _ in region.weights), *flat[1 + len(region.weights) :]]
        torch.testing.assert_close(run(given), run(flat), rtol=0, atol=0)

    def test_weights_among_its_inputs_are_looked_at_in_every_call(self) -> None:
        region, run = loaded(weights="input")
        assert not holds_weights(run)
        first, second = tensors(region, 1), tensors(region, 2)
        constants = tensors(region)[1 + len(region.weights) :]
        for weights in (first, second, first):
            flat = [first[0], *weights[1 : 1 + len(region.weights)], *constants]
            torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0], rtol=1e-5, atol=1e-5)

    def test_results_are_the_callers_and_no_later_call_changes_them(self) -> None:
        region, run = loaded(convolution)
        first, second = tensors(region, 1), tensors(region, 2)
        (kept,) = run(first)
        copy = kept.clone()
        (other,) = run(second)
        assert not torch.equal(kept, other)
        assert torch.equal(kept, copy)

    def test_binds_tensors_where_they_lie(self, monkeypatch) -> None:
        region, run = loaded()
        bound: list[int] = []
        shared = run._shared
        monkeypatch.setattr(run, "_shared", lambda tensor: (bound.append(tensor.data_ptr()), shared(tensor))[1])
        flat = tensors(region)
        outputs = run(flat)
        assert bound == [flat[0].data_ptr(), *(tensor.data_ptr() for tensor in outputs)]

    def test_takes_parameters_views_and_what_is_not_contiguous_and_leaves_them_alone(self) -> None:
        region, run = loaded(weights="input")
        flat = tensors(region)
        wanted = run(flat)[0]
        apart = flat[0].transpose(1, 2).contiguous().transpose(1, 2)
        given = [apart, *(torch.nn.Parameter(tensor) for tensor in flat[1:])]
        copies = [tensor.detach().clone() for tensor in given]
        assert torch.equal(run(given)[0], wanted)
        assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))

    def test_several_threads_may_call_one_engine(self) -> None:
        region, run = loaded()
        many = [tensors(region, seed) for seed in range(8)]
        wanted = [run(flat)[0] for flat in many]
        with ThreadPoolExecutor(4) as pool:
            for found, want in zip(pool.map(lambda flat: run(flat)[0], many), wanted, strict=True):
                torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)

    def test_a_forked_child_compiles_its_own(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        wanted = run(flat)[0]
        child = os.fork()
        if not child:
            os._exit(0 if torch.allclose(run(flat)[0], wanted, rtol=1e-5, atol=1e-5) else 1)
        assert os.waitpid(child, 0)[1] == 0
        torch.testing.assert_close(run(flat)[0], wanted)

    @pytest.mark.parametrize("count", [1, 2])
    def test_has_as_many_threads_as_torch_unless_it_says_otherwise(self, count: int, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(count)
            assert loaded()[1]._model.get_property("INFERENCE_NUM_THREADS") == count
            stated = OpenvinoEngine(*changed(tmp_path, threads=3 - count))
            assert stated._model.get_property("INFERENCE_NUM_THREADS") == 3 - count
        finally:
            torch.set_num_threads(threads)

    def test_check_says_what_differs(self) -> None:
        region, run = loaded()
        flat = tensors(region)
        with pytest.raises(VerifyError, match="input 0: dtype float64 found, float32 required"):
            run.check([flat[0].double(), *flat[1:]])

    def test_registered(self) -> None:
        assert engine("openvino") is OpenvinoEngine

    def test_runs_in_a_process_without_the_compiler_and_without_telemetry(self, tmp_path: Path) -> None:
        region, artefact = built_openvino(block)
        torch.save(tensors(region), tmp_path / "flat.pt")
        script = f"""
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from diffkiln.runtime.engines import engine
layouts = [SimpleNamespace(**row) for row in json.loads(sys.argv[1])]
run = engine("openvino")(Path({str(artefact.directory)!r}), layouts)
print(run(torch.load({str(tmp_path / "flat.pt")!r}))[0].double().sum().item())
assert not {{"onnx", "diffkiln.exporters", "torch._inductor", "openvino_telemetry"}} & set(sys.modules)
"""
        layouts = json.dumps([spec.model_dump(mode="json") for spec in artefact.inputs])
        home = os.environ | {"HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", script, layouts]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=home)
        assert done.returncode == 0, done.stderr
        wanted = interpreted(region, tensors(region))[0].double().sum().item()
        assert float(done.stdout) == pytest.approx(wanted, abs=1e-3)
        assert not (tmp_path / "home" / "intel").exists()


class TestKeeping:
    def test_what_was_compiled_is_kept_without_its_weights_and_used(self, own_state, monkeypatch, caplog) -> None:
        caplog.set_level(logging.INFO)
        region, _ = loaded()
        assert "was compiled for this CPU in" in caplog.text
        (kept,) = own_state.iterdir()
        assert kept.suffix == ".cache"  # `diffkiln clean` finds it
        flat = tensors(region)
        caplog.clear()
        torch.testing.assert_close(loaded()[1](flat), interpreted(region, flat), rtol=1e-5, atol=1e-5)
        assert "compiled" not in caplog.text

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:99] + b"x" * 999])
    def test_what_is_damaged_is_compiled_again(self, own_state, damage, caplog) -> None:
        loaded()
        (kept,) = own_state.iterdir()
        kept.write_bytes(damage(kept.read_bytes()))
        caplog.set_level(logging.INFO)
        region, run = loaded()
        assert "was compiled for this CPU" in caplog.text
        torch.testing.assert_close(run(tensors(region)), interpreted(region, tensors(region)), rtol=1e-5, atol=1e-5)

    def test_other_settings_are_another_compilation(self, own_state, tmp_path: Path) -> None:
        loaded()
        OpenvinoEngine(*changed(tmp_path / "engine", performance_mode="throughput"))
        assert len(list(own_state.iterdir())) == 2

    def test_a_directory_that_cannot_be_written_costs_the_next_load_alone(self, monkeypatch, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("a file")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        region, run = loaded()
        torch.testing.assert_close(run(tensors(region)), interpreted(region, tensors(region)), rtol=1e-5, atol=1e-5)


class TestRefusing:
    @pytest.mark.parametrize("name", [MODEL, WEIGHTS, FACTS])
    def test_missing_files(self, tmp_path: Path, name: str) -> None:
        folder, inputs = changed(tmp_path)
        (folder / name).unlink()
        with pytest.raises(Incomplete, match=rf"{name} is missing"):
            OpenvinoEngine(folder, inputs)

    @pytest.mark.parametrize("name", [MODEL, WEIGHTS])
    def test_files_that_are_cut_short(self, tmp_path: Path, name: str) -> None:
        folder, inputs = changed(tmp_path)
        os.truncate(folder / name, 100)
        with pytest.raises(Incomplete, match=r"found 100 bytes, required \d+: it is cut short"):
            OpenvinoEngine(folder, inputs)

    @pytest.mark.parametrize("facts", ["", "[]", "{}", '{"version": 1}', "[" * 100_000])
    def test_facts_that_are_none(self, tmp_path: Path, facts: str) -> None:
        folder, inputs = changed(tmp_path)
        (folder / FACTS).write_text(facts)
        with pytest.raises(ManifestInvalid, match="it does not describe the engine"):
            OpenvinoEngine(folder, inputs)

    def test_other_number_of_inputs(self, tmp_path: Path) -> None:
        folder, inputs = changed(tmp_path)
        with pytest.raises(Incompatible, match=r"found 12 inputs, required 1"):
            OpenvinoEngine(folder, inputs[:1])

    def test_another_version(self, tmp_path: Path) -> None:
        with pytest.raises(Incompatible, match=r"openvino: found .*, required 2025\.1\.0.*pip install openvino==2025"):
            OpenvinoEngine(*changed(tmp_path, version="2025.1.0"))

    def test_no_openvino(self, tmp_path: Path, monkeypatch) -> None:
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr("diffkiln.runtime.engines.openvino.files.metadata.version", version)
        with pytest.raises(MissingDependency, match=r"found nothing, required .*pip install openvino=="):
            OpenvinoEngine(*changed(tmp_path))

    def test_another_device(self) -> None:
        _, artefact = built_openvino(block)
        with pytest.raises(Incompatible, match="found cuda:0, required a CPU"):
            OpenvinoEngine(artefact.directory, artefact.inputs, "cuda:0")

    def test_a_cpu_without_bfloat16(self, tmp_path: Path, monkeypatch) -> None:
        class Core:
            def get_property(self, *_: str) -> list[str]:
                return ["FP32"]

        monkeypatch.setattr(module, "import_openvino", lambda: type("openvino", (), {"Core": Core}))
        with pytest.raises(Incompatible, match="found a CPU without bfloat16"):
            OpenvinoEngine(*changed(tmp_path, inference_precision="bf16"))

    def test_a_graph_that_is_none(self, tmp_path: Path) -> None:
        folder, inputs = changed(tmp_path, digest="0" * 64)
        size = (folder / MODEL).stat().st_size
        (folder / MODEL).write_bytes(b"<net>" + b" " * (size - 5))
        with pytest.raises(Incompatible, match="cannot compile the engine here"):
            OpenvinoEngine(folder, inputs)
