"""TensorRT's engines where they cannot run: what is refused before anything is deserialized, and kernels that are kept.

What they compute is tested on a GPU: tests/gpu/test_tensorrt.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx
import torch

from diffkiln.bundle.digest import sha256_file
from diffkiln.bundle.state import state_dir
from diffkiln.bundle.tensorrt import ENGINE, FACTS, KERNELS
from diffkiln.errors import DiffkilnError, Incompatible, Incomplete, ManifestInvalid, MissingDependency
from diffkiln.runtime.engines import engine
from diffkiln.runtime.engines.tensorrt import engine as tensorrt_engine
from diffkiln.runtime.engines.tensorrt import files
from diffkiln.runtime.engines.tensorrt.engine import TensorrtEngine
from diffkiln.runtime.engines.tensorrt.kernels import Kernels
from tests.exporters.regions import block, built_tensorrt

VERSION = tensorrt_rtx.__version__


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The block's engine, to be damaged."""
    return Path(shutil.copytree(built_tensorrt(block)[1].directory, tmp_path / "engine"))


def restated(folder: Path, **changed: object) -> None:
    told = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(told | changed))


def opened(folder: Path, device: str = "cuda") -> TensorrtEngine:
    return TensorrtEngine(folder, built_tensorrt(block)[1].inputs, device)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with the GPU that the engine is for. Nothing may be deserialized on it."""
    monkeypatch.setattr(files, "capability", lambda _=None: (8, 9))
    monkeypatch.setattr(tensorrt_rtx, "Runtime", lambda _: pytest.fail("the engine was reached"))


class TestRefusing:
    def test_registered(self) -> None:
        assert engine("tensorrt") is TensorrtEngine

    @pytest.mark.parametrize("name", [ENGINE, FACTS])
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        with pytest.raises(Incomplete, match=rf"the file {name} is missing"):
            opened(copy)

    @pytest.mark.parametrize("left", [0.0, 0.5, 0.9999])
    def test_engine_that_is_cut_short(self, copy: Path, here: None, left: float) -> None:
        data = (copy / ENGINE).read_bytes()
        (copy / ENGINE).write_bytes(data[: int(len(data) * left)])
        with pytest.raises(
            Incomplete, match=rf"found {int(len(data) * left)} bytes, required {len(data)}: .* cut short"
        ):
            opened(copy)

    def test_engine_of_another_version(self, copy: Path, here: None) -> None:
        restated(copy, version="1.6.1.120")
        with pytest.raises(
            Incompatible, match=rf"tensorrt-rtx: found {VERSION}, required 1\.6\.1\.120.*tensorrt-rtx==1\.6\.1\.120"
        ):
            opened(copy)

    def test_engine_for_another_gpu(self, copy: Path, here: None) -> None:
        restated(copy, sm="sm_120")
        with pytest.raises(Incompatible, match="gpu: found sm_89, required sm_120"):
            opened(copy)

    def test_library_that_is_not_installed(self, copy: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(MissingDependency, match=rf"found nothing, required {VERSION}\. pip install tensorrt-rtx=="):
            opened(copy)

    def test_machine_without_a_gpu_is_told_with_every_other_difference(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "capability", lambda _=None: None)
        restated(copy, version="1.6.1.120")
        for device in ("cpu", "cuda"):
            with pytest.raises(Incompatible) as caught:
                opened(copy, device)
            assert [problem.where for problem in caught.value.problems] == ["tensorrt-rtx", "gpu"]
            assert f"gpu: found no CUDA GPU ({device}), required sm_89" in str(caught.value)

    def test_other_number_of_inputs(self, copy: Path) -> None:
        with pytest.raises(Incompatible, match="found 12 inputs, required 1"):
            TensorrtEngine(copy, built_tensorrt(block)[1].inputs[:1], "cuda")

    @pytest.mark.parametrize(
        "changed",
        [{"inputs": 3}, {"bytes": "all"}, {"bytes": -1}, {"outputs": [None]}, {"weight_budget": 0.5}, {"sm": None}],
    )
    def test_facts_that_are_none(self, copy: Path, changed: dict[str, object]) -> None:
        restated(copy, **changed)
        with pytest.raises(ManifestInvalid, match=r"engine\.json: it does not describe the engine"):
            opened(copy)

    @pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 10**5, b" " * 2**21])
    def test_what_is_no_json(self, copy: Path, data: bytes) -> None:
        (copy / FACTS).write_bytes(data)
        with pytest.raises(DiffkilnError, match=r"engine\.json"):
            opened(copy)

    def test_library_that_this_diffkiln_does_not_know(self, copy: Path) -> None:
        restated(copy, library="os")
        with pytest.raises(Incompatible, match="found 'os', this diffkiln runs tensorrt_rtx, tensorrt"):
            opened(copy)


class Cache:
    """As TensorRT's: what it was given, and what it has compiled since."""

    def __init__(self) -> None:
        self.data, self.given = b"", b""

    def deserialize(self, data: bytes) -> bool:
        if data.startswith(b"foreign"):
            return False
        self.data = self.given = data
        return True

    def serialize(self) -> bytes:
        return self.data


def stand_in() -> Any:
    """What `Kernels` uses of an engine."""
    cache = Cache()
    config = SimpleNamespace(
        create_runtime_cache=lambda: cache,
        set_runtime_cache=lambda _: True,
        set_execution_context_allocation_strategy=lambda strategy: setattr(config, "strategy", strategy),
    )
    return SimpleNamespace(
        config=config, cache=cache, create_runtime_config=lambda: config, create_execution_context=lambda *given: given
    )


class TestKernels:
    @pytest.fixture(autouse=True)
    def state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def test_what_was_compiled_is_there_at_the_next_load(self, copy: Path) -> None:
        kernels, first, second = Kernels(copy), stand_in(), stand_in()
        assert kernels.context(first, "user")
        assert first.config.strategy == "user"
        first.cache.data = b"compiled"
        kernels.keep()
        (kept,) = state_dir("kernels").iterdir()
        assert kept.name == f"{sha256_file(copy / ENGINE)}.cache"
        Kernels(copy).context(second, "user")
        assert second.cache.given == b"compiled"

    def test_those_of_the_bundle_come_first(self, copy: Path) -> None:
        (copy / KERNELS).write_bytes(b"brought along")
        engine = stand_in()
        Kernels(copy).context(engine, "user")
        assert engine.cache.given == b"brought along"

    def test_those_of_another_gpu_are_left_aside_and_replaced(self, copy: Path) -> None:
        kept = state_dir("kernels") / f"{sha256_file(copy / ENGINE)}.cache"
        kept.write_bytes(b"foreign")
        kernels, engine = Kernels(copy), stand_in()
        kernels.context(engine, "user")
        assert engine.cache.given == b""
        engine.cache.data = b"own"
        kernels.keep()
        assert kept.read_bytes() == b"own"

    def test_all_that_a_context_has_may_go_into_a_bundle(self, copy: Path) -> None:
        kernels, engine = Kernels(copy), stand_in()
        kernels.context(engine, "user")
        engine.cache.data = b"compiled"
        assert kernels.compiled() == b"compiled"

    def test_library_that_keeps_none_gets_an_ordinary_context(self, copy: Path) -> None:
        kernels = Kernels(copy)
        engine = SimpleNamespace(create_execution_context=lambda *given: given)
        assert kernels.context(engine, "user") == ("user",)
        kernels.keep()
        assert kernels.compiled() == b""

    def test_state_that_cannot_be_written_is_told_and_costs_nothing_else(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        kernels, engine = Kernels(copy), stand_in()
        kernels.context(engine, "user")
        engine.cache.data = b"compiled"
        kernels.keep()
        assert "will be compiled again" in caplog.text


class Context:
    """As TensorRT's: it notes which memory it is told to work in."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.set_device_memory = lambda address, size: self.memory.append(address)
        self.set_input_shape = self.set_tensor_address = lambda *_: True
        self.get_tensor_shape = lambda _: (1,)
        self.execute_async_v3 = lambda _: True


class Lender(SimpleNamespace):
    """An accelerator that lends memory, and counts what is lent at once."""

    def __init__(self) -> None:
        stream = SimpleNamespace(wait_stream=lambda _: None, cuda_stream=0)
        super().__init__(active=nullcontext, stream=lambda: stream, lent=0, most=0, sizes=[])
        self.current_stream = self.default_stream = lambda: stream

    def empty(self, size: int) -> torch.Tensor:
        """Memory that is given back when nobody holds it any more."""
        self.lent += 1
        self.most = max(self.most, self.lent)
        self.sizes.append(size)
        made = torch.empty(size, dtype=torch.uint8)
        weakref.finalize(made, self._back)
        return made

    def _back(self) -> None:
        self.lent -= 1


def test_engines_share_the_memory_that_they_work_in(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None keeps memory of its own: two engines that run in turn hold that of one, and none between their calls."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(files, "capability", lambda _=None: (8, 9))
    lender, strategies = Lender(), []

    def made(_: Kernels, __: Any, strategy: Any) -> Context:
        strategies.append(strategy)
        return Context()

    deserialized = SimpleNamespace(
        device_memory_size_v2=4096, num_io_tensors=0, get_tensor_dtype=lambda _: tensorrt_rtx.DataType.FLOAT
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: deserialized)
    monkeypatch.setattr(tensorrt_rtx, "Runtime", lambda _: runtime)
    monkeypatch.setattr(tensorrt_engine, "accelerator", lambda _: lender)
    monkeypatch.setattr(Kernels, "context", made)
    engines = [opened(copy) for _ in range(2)]
    assert strategies == [tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED] * 2
    for each in (*engines, engines[0]):
        each.device = torch.device("cpu")
        each([torch.zeros(1) for _ in each.inputs])
    assert (lender.sizes, lender.most, lender.lent) == ([4096] * 3, 1, 0)
