from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkiln.bundle.native import COMPARE
from diffkiln.errors import Incompatible, Incomplete, VerifyError
from diffkiln.program import Program
from diffkiln.runtime.engines import comparing, engine
from diffkiln.runtime.engines.aot_inductor import AotInductorEngine
from tests.exporters.regions import block, built, int8_linear, interpreted, stated, tensors, total

pytestmark = pytest.mark.slow


def loaded(make: Callable[[], Program] = block) -> tuple[Program, AotInductorEngine]:
    region, artefact = built(make)
    return region, AotInductorEngine(artefact.directory, artefact.inputs)


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other far longer than an engine's call takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [block, int8_linear])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gives_what_the_region_gives(make: Callable[[], Program], mode: Callable) -> None:
    region, run = loaded(make)
    flat = tensors(region)
    run.check(flat)
    with mode():
        for found, wanted in zip(run(flat), interpreted(region, flat), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert not found.requires_grad


def test_outputs_lie_as_recorded() -> None:
    _, artefact = built(block)
    region, run = loaded()
    found = [(str(out.dtype).removeprefix("torch."), tuple(out.shape), out.stride()) for out in run(tensors(region))]
    assert found == stated(artefact.outputs)


def test_weights_are_looked_at_in_every_call() -> None:
    region, run = loaded()
    first, second = tensors(region, 1), tensors(region, 2)
    for weights in (first, second, first):
        flat = [first[0], *weights[1:]]
        torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(run(first)[0], run([first[0], *second[1:]])[0])


def test_leaves_the_callers_list_and_tensors_alone() -> None:
    region, run = loaded()
    flat = tensors(region)
    copies = [tensor.clone() for tensor in flat]
    run(flat)
    assert len(flat) == len(copies)
    assert all(torch.equal(a, b) for a, b in zip(flat, copies, strict=True))


def test_a_torch_whose_loader_takes_archives_only_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 is such a one. This torch's loader takes both, so it shows that the archive is as it should be."""
    given: list[str] = []
    names: list[list[str]] = []

    def archives_only(package: str, *rest: object) -> object:
        given.append(package)
        if Path(package).is_dir():
            raise RuntimeError("Failed to initialize zip archive: file open failed")
        names.append(zipfile.ZipFile(package).namelist())
        return real(package, *rest)

    real = torch._C._aoti.AOTIModelPackageLoader
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", archives_only)
    region, run = loaded()
    flat = tensors(region)
    torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0], rtol=1e-5, atol=1e-5)
    folder = "engine/data/aotinductor/model"
    assert {f"{folder}/engine.{ending}" for ending in ("so", "cpp")} | {f"{folder}/engine_metadata.json"} <= {*names[0]}
    assert [Path(package).exists() for package in given] == [True, False]


def test_copies_what_is_not_contiguous() -> None:
    region, run = loaded()
    flat = tensors(region)
    wanted = run(flat)[0]
    apart = flat[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart.is_contiguous()
    assert torch.equal(run([apart, *flat[1:]])[0], wanted)


def test_takes_parameters_and_views() -> None:
    region, run = loaded()
    flat = tensors(region)
    wanted = run(flat)[0]
    storage = torch.cat([torch.zeros(3), *(tensor.flatten() for tensor in flat)])
    views, at = [], 3
    for tensor in flat:
        views.append(storage[at : at + tensor.numel()].view(tensor.shape))
        at += tensor.numel()
    torch.testing.assert_close(run(views)[0], wanted)
    assert torch.equal(run([flat[0], *(torch.nn.Parameter(t) for t in flat[1:])])[0], wanted)


def test_several_threads_may_call_one_engine() -> None:
    from concurrent.futures import ThreadPoolExecutor

    region, run = loaded()
    many = [tensors(region, seed) for seed in range(8)]
    wanted = [run(flat)[0] for flat in many]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(lambda flat: run(flat)[0], many), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("make", [block, total])
def test_any_number_of_threads(make: Callable[[], Program]) -> None:
    region, run = loaded(make)
    flat, threads = tensors(region), torch.get_num_threads()
    try:
        for count in (1, 7, 19, 70):
            torch.set_num_threads(count)
            torch.testing.assert_close(run(flat), interpreted(region, flat), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_memory_does_not_grow() -> None:
    region, run = loaded()
    flat = tensors(region)
    for _ in range(200):
        run(flat)
    before = resident()
    for _ in range(1000):
        run(flat)
    assert resident() - before < 2**20


@pytest.mark.usefixtures("one_thread")
def test_adds_little_to_the_loaders_own_call() -> None:
    region, run = loaded()
    flat = tensors(region)

    def fastest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(300):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    direct = fastest(lambda: run._run(list(flat)))
    assert fastest(lambda: run(flat)) - direct < 100e-6


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda flat: flat[:-1], "11 inputs found, 12 required"),
        (lambda flat: [flat[0].double(), *flat[1:]], "input 0: dtype float64 found, float32 required"),
        (lambda flat: [flat[0][:, :8], *flat[1:]], "input 0: shape"),
        (lambda flat: [flat[0], flat[1].expand(2, 32)[0].as_strided((32,), (0,)), *flat[2:]], "input 1: stride"),
        (lambda flat: [flat[0].to("meta"), *flat[1:]], "input 0: it is on meta"),
    ],
)
def test_check_says_what_differs(spoil: Callable[[list], list], said: str) -> None:
    region, run = loaded()
    with pytest.raises(VerifyError, match=said):
        run.check(spoil(tensors(region)))


def test_check_overlooks_strides_without_meaning() -> None:
    region, run = loaded()
    flat = tensors(region)
    run.check([flat[0].as_strided(flat[0].shape, (7, 32, 1)), *flat[1:]])


def test_loads_without_compilers_processes_or_inductor(tmp_path: Path) -> None:
    region, artefact = built(block)
    torch.save(tensors(region), tmp_path / "flat.pt")
    script = f"""
import json, sys, time
from pathlib import Path
from typing import Any
from types import SimpleNamespace
import torch
from diffkiln.runtime.engines import comparing, engine
layouts = [SimpleNamespace(**row) for row in json.loads(sys.argv[1])]

def refuse(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        raise AssertionError(f"{{event}} {{args}}")

sys.addaudithook(refuse)
start = time.perf_counter()
run = engine("aot_inductor")(Path({str(artefact.directory)!r}), layouts)
out = run(torch.load({str(tmp_path / "flat.pt")!r}))[0]
print(json.dumps([time.perf_counter() - start, out.double().sum().item()]))
assert not [name for name in sys.modules if name.startswith(("torch._inductor", "diffkiln.exporters"))]
"""
    layouts = json.dumps([spec.model_dump(mode="json") for spec in artefact.inputs])
    home = {"HOME": str(tmp_path), "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", script, layouts],
        env=home | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, total = json.loads(done.stdout)
    assert total == pytest.approx(interpreted(region, tensors(region))[0].double().sum().item(), abs=1e-3)
    assert seconds < 5
    assert not (tmp_path / "none").exists()


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match=r"engine\.so"):
        AotInductorEngine(tmp_path, ())


def test_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "aotinductor" / "model"
    folder.mkdir(parents=True)
    (folder / "engine.so").write_bytes(b"\x7fELF nothing")
    (folder / "engine_metadata.json").write_text('{"AOTI_DEVICE_KEY": "cpu"}')
    with pytest.raises(Incompatible, match="cannot load the engine"):
        AotInductorEngine(tmp_path, ())


def test_a_backend_that_no_package_brings_is_refused() -> None:
    assert engine("aot_inductor") is AotInductorEngine
    with pytest.raises(Incompatible, match="'onyx', this diffkiln runs aot_inductor, "):
        engine("onyx")


class Loader:
    """torch's loader: notes what it is made with, and how many threads call it at once."""

    def __init__(self, package: str, model: str, alone: bool, runners: int, index: int) -> None:
        self.alone, self.index = alone, index
        self.inside = self.most = 0

    def boxed_run(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.02)
        self.inside -= 1
        return flat


def loaded_by_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str) -> Any:
    library = tmp_path / "data" / "aotinductor" / "model" / "engine.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    return AotInductorEngine(tmp_path, [], device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_host_does_not_wait_for_the_engines_previous_call_on_a_gpu(monkeypatch, tmp_path, device: str) -> None:
    """Unless it is alone, torch's loader waits for that call before each, and graphs cannot record the events."""
    assert loaded_by_stand_in(monkeypatch, tmp_path, device)._loader.alone


def test_calls_from_several_threads_take_turns_in_an_engine_that_is_alone(monkeypatch, tmp_path) -> None:
    engine = loaded_by_stand_in(monkeypatch, tmp_path, "cuda")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(engine, [[torch.zeros(2)]] * 8))
    assert engine._loader.most == 1


def test_the_self_test_has_an_engine_for_a_gpu_compare_layouts(tmp_path: Path) -> None:
    """The engine's function is called with true, and afterwards with false; one of an earlier build has none."""
    code = f"int told = 0;\nvoid {COMPARE}(unsigned char on) {{ told = 10 * told + on + 1; }}\n"
    for name, text in (("now", code), ("before", "int told = 0;\n")):
        (tmp_path / f"{name}.c").write_text(text)
        how = ["gcc", "-shared", "-fPIC", str(tmp_path / f"{name}.c"), "-o", str(tmp_path / f"{name}.so")]
        subprocess.run(how, check=True)
        run = object.__new__(AotInductorEngine)
        run.device, run._library = torch.device("cuda:0"), tmp_path / f"{name}.so"
        told = ctypes.c_int.in_dll(ctypes.CDLL(str(run._library)), "told")
        with comparing(run):
            assert told.value == (2 if name == "now" else 0)
        assert told.value == (21 if name == "now" else 0)
