"""Whole calls on a simulated GPU: the picture is the CPU's to the bit, and nothing is read before it was waited for.

What a wait is good for is shown by leaving it out: then the picture is another one, and the clocks name the read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.runtime import staging
from diffkiln.runtime.engines.onnx import engine as onnx_engine
from diffkiln.runtime.staging import Staging
from diffkiln.runtime.transfers import TransferQueue
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache
from tests.simulated import Simulated
from tests.simulated.whole import weights_on

GROUPS = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}
#: How weights are kept, by what it is called.
POLICIES: dict[str, dict[str, Any]] = {
    "resident": {},
    "from the host": {**GROUPS, "use_stream": True, "to": "host"},
    "from the disk": {**GROUPS, "use_stream": True, "to": "disk"},
    "without a stream": {**GROUPS, "use_stream": False},
    "through slots, from the host": {"strategy": "stream", "to": "host"},
    "through slots, from the disk": {"strategy": "stream", "to": "disk"},
}


def drawn(bundle: Path) -> torch.Tensor:
    with diffkiln.load(bundle, check_engines=False) as pipe:
        return pipe("seven", generator=torch.Generator().manual_seed(3), output_type="pt").images


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path) -> torch.Tensor:
    return drawn(digits_bundle)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_gives_the_cpus_picture(policy: str, digits_bundle: Path, wanted: torch.Tensor) -> None:
    device = Simulated()
    with weights_on(device, POLICIES[policy]):
        found = drawn(digits_bundle)
    assert torch.equal(found, wanted)
    assert device.races == []
    assert device.pinned_bytes == 0, "pinned memory is left after the pipeline was closed"


def left_out(_: object, *__: object) -> None:
    """In the place of a wait."""


@pytest.mark.parametrize(
    "policy", ["from the host", "from the disk", "through slots, from the host", "through slots, from the disk"]
)
def test_a_call_that_does_not_wait_for_a_group_gives_another_picture(
    policy: str, digits_bundle: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferQueue, "wait", left_out)
    device = Simulated()
    with weights_on(device, POLICIES[policy]):
        try:
            found = drawn(digits_bundle)
        except diffkiln.DiffkilnError:  # poison is not finite
            found = torch.full_like(wanted, torch.nan)
    assert not torch.equal(found, wanted)
    assert device.races


@pytest.fixture(scope="module")
def by_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits whose text encoder and VAE are run by ONNX Runtime, which waits for the device before each run."""
    spec = json.loads((DIGITS / "spec.json").read_text())
    passes = [{"name": "compile", "component": name, "backend": "onnx"} for name in ("text_encoder", "vae")]
    output = tmp_path_factory.mktemp("onnx") / "bundle"
    return diffkiln.compile(spec | {"passes": passes}, output, base=DIGITS, cache=engine_cache()).path


ONNX = ("text_encoder", "vae")


@pytest.mark.more
@pytest.mark.parametrize("policy", POLICIES)
def test_onnx_runtime_reads_weights_that_have_arrived(
    policy: str, by_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = drawn(by_onnx)
    device = Simulated()
    monkeypatch.setattr(onnx_engine, "accelerator", lambda _: device)
    with weights_on(device, POLICIES[policy], ONNX):
        found = drawn(by_onnx)
    assert torch.equal(found, wanted)
    assert device.races == []


@pytest.mark.more
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "resident"])
def test_onnx_runtime_that_does_not_wait_gives_another_picture(policy: str, by_onnx: Path) -> None:
    wanted = drawn(by_onnx)
    with weights_on(Simulated(), POLICIES[policy], ONNX):
        try:
            found = drawn(by_onnx)
        except diffkiln.DiffkilnError:
            found = torch.full_like(wanted, torch.nan)
    assert not torch.equal(found, wanted)


@pytest.mark.more
@pytest.mark.parametrize("policy", ["resident", "from the disk"])
def test_onnx_runtimes_weights_are_read_by_several_threads_into_two_buffers(
    policy: str, by_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of other engines: ONNX Runtime is given them with each call, and reads no file of its own."""
    readers, brought = set(), set()
    monkeypatch.setattr(staging, "PIECE", 512)
    device = Simulated()

    def noting(kind: type, name: str, note: Callable[..., None]) -> None:
        run = getattr(kind, name)

        def noted(self: Any, *given: Any) -> Any:
            note(*given)
            return run(self, *given)

        monkeypatch.setattr(kind, name, noted)

    noting(Staging, "bring", lambda file, *_: brought.add(file))
    reader = staging.Reader.__init__
    monkeypatch.setattr(
        staging.Reader, "__init__", lambda self, read, threads=4, piece=512: reader(self, noted(read), threads, piece)
    )

    def noted(read: Callable[..., None]) -> Callable[..., None]:
        def into(*given: Any) -> None:
            readers.add(threading.current_thread().name)
            read(*given)

        return into

    monkeypatch.setattr(onnx_engine, "accelerator", lambda _: device)
    with weights_on(device, POLICIES[policy], ONNX):
        drawn(by_onnx)
    files = {path for path in brought if path.startswith(tuple(f"weights/{name}/" for name in ONNX))}
    assert {path.split("/")[1] for path in files} == set(ONNX)
    assert len([name for name in readers if name.startswith("diffkiln-read")]) >= 4
