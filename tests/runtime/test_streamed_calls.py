"""Whole calls with weights that stream: to the bit as with all weights in memory, whatever the schedule and variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import Incompatible
from diffkiln.runtime import loading
from diffkiln.runtime.graphs import STEPWISE, WHOLE, Graphs
from diffkiln.runtime.memory import plan_memory
from diffkiln.runtime.transfers import TransferQueue
from diffkiln.runtime.weights import WeightStore
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS
from tests.simulated import Simulated
from tests.simulated.graphs import Capture
from tests.simulated.whole import weights_on

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

STEPS = (6, 4)
LIMIT = 3_000_000
POLICIES: dict[str, dict[str, Any] | None] = {
    "resident": None,
    "group": {"strategy": "group"},
    "group without a stream": {"strategy": "group", "use_stream": False},
    "auto": {"strategy": "auto", "max_memory": LIMIT},
    "stream": {"strategy": "stream"},
    "stream within a limit": {"strategy": "stream", "max_memory": LIMIT},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of two variants, whose every second step reuses what the one before it computed; without engines."""
    inputs = {"height": 32, "width": 32, "guidance_scale": 1.0, "call": {"max_sequence_length": 16}}
    spec = {
        "spec_version": 1,
        "source": {"model": "model", "dtype": "float32"},
        "target": {"device": "cpu"},
        "inputs": [inputs | {"num_inference_steps": steps} for steps in STEPS],
        "passes": [{"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}],
        "runtime": {"offload": {"strategy": "stream"}},
    }
    return diffkiln.compile(spec, tmp_path_factory.mktemp("streamed") / "bundle", base=DIGITS).path


def drawn(pipe: Any, steps: int, **keywords: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe("seven", num_inference_steps=steps, generator=generator, output_type="pt", **keywords).images


def loaded(bundle: Path, policy: dict[str, Any] | None) -> Any:
    with mock.patch.object(loading, "offload_policy", return_value=policy):
        return diffkiln.load(bundle)


@pytest.fixture(scope="module")
def wanted(bundle: Path) -> dict[int, torch.Tensor]:
    with loaded(bundle, None) as pipe:
        return {steps: drawn(pipe, steps) for steps in STEPS}


def failing(at: int) -> Callable[..., dict[str, Any]]:
    def fail(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == at:
            raise RuntimeError("stop")
        return {}

    return fail


def drawn_in_turn(pipe: Any, wanted: dict[int, torch.Tensor]) -> None:
    """Draws by each variant, breaks off at the end of a step and within one, and draws again."""
    for steps in STEPS:
        assert torch.equal(drawn(pipe, steps), wanted[steps])
        with pytest.raises(RuntimeError, match="stop"):
            drawn(pipe, steps, callback_on_step_end=failing(2))
        with broken(pipe), pytest.raises(Exception, match="in mid-step"):
            drawn(pipe, steps)
    for steps in STEPS:
        assert torch.equal(drawn(pipe, steps), wanted[steps])


def broken(pipe: Any) -> Any:
    """Has a call fail where the sixth group of weights comes into use, after the fifth has been computed with."""
    store, entered = pipe.executor.store, iter(range(100))
    get = store.get

    def fails(key: Any) -> Any:
        if next(entered) == 5:
            raise RuntimeError("in mid-step")
        return get(key)

    return mock.patch.object(store, "get", fails)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_strategy_draws_the_same_on_a_cpu(bundle: Path, wanted: dict[int, torch.Tensor], policy: str) -> None:
    with loaded(bundle, POLICIES[policy]) as pipe:
        drawn_in_turn(pipe, wanted)


@pytest.mark.parametrize("to", ["host", "disk"])
def test_streaming_draws_the_same_on_a_simulated_gpu(bundle: Path, wanted: dict[int, torch.Tensor], to: str) -> None:
    device = Simulated()
    with weights_on(device, {"strategy": "stream", "to": to}), diffkiln.load(bundle) as pipe:
        drawn(pipe, STEPS[0])
        before = device.allocations
        drawn_in_turn(pipe, wanted)
        assert device.allocations == before
    assert device.races == []
    assert device.pinned_bytes == 0


@pytest.mark.parametrize(
    ("unit", "limit"),
    [
        (STEPWISE, None),
        pytest.param(WHOLE, None, marks=pytest.mark.more),
        pytest.param(WHOLE, LIMIT, marks=pytest.mark.more),
    ],
)
def test_graphs_copy_the_weights_of_their_steps(
    bundle: Path, wanted: dict[int, torch.Tensor], unit: str, limit: int | None
) -> None:
    device = Simulated()
    policy = {"strategy": "stream"} | ({"max_memory": limit} if limit else {})
    with weights_on(device, policy), diffkiln.load(bundle) as pipe:
        capture = Capture(device)
        pipe.executor.graphs = Graphs(unit, torch.device("cpu"), capture)
        for steps in (*STEPS, *STEPS, STEPS[0], STEPS[0]):
            assert torch.equal(drawn(pipe, steps), wanted[steps])
        recorded, before = capture.recorded, device.allocations
        for steps in STEPS:
            forgotten(pipe)  # as what streams is after an error, or a call of another pipeline's
            assert torch.equal(drawn(pipe, steps), wanted[steps])
        assert (capture.recorded, device.allocations) == (recorded, before)
    assert capture.launched > recorded
    assert device.races == []


def forgotten(pipe: Any) -> None:
    """Lets all groups leave their slots."""
    pipe.executor.store.drop_but(frozenset())


#: What is left out, and what comes of it.
MISTAKES: dict[str, tuple[type, str, str]] = {
    "copies that do not follow what is recorded": (TransferQueue, "follow", "a stream that is not captured"),
    "an end that does not wait for copies": (TransferQueue, "arrive", "unjoined work|uncaptured work"),
}


def shown(pipe: Any, step: int, *_: object) -> None:
    """Decodes a step's latents, for which the denoiser's weights leave their slots."""
    if step == 2:
        pipe.preview("pt")


@pytest.mark.more
@pytest.mark.parametrize("settles", [True, False])
def test_a_launch_brings_back_what_it_found_in_the_slots(
    bundle: Path, wanted: dict[int, torch.Tensor], settles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = STEPS[0]
    with weights_on(Simulated(), {"strategy": "stream"}), diffkiln.load(bundle) as pipe:
        pipe.executor.graphs = Graphs(STEPWISE, torch.device("cpu"), Capture(pipe.executor.store._accelerator))
        assert torch.equal(drawn(pipe, steps, callback_on_step_end=shown), wanted[steps])
        assert torch.equal(drawn(pipe, steps), wanted[steps])
        if not settles:
            monkeypatch.setattr(WeightStore, "settle", lambda *_: None)
        found = drawn(pipe, steps, callback_on_step_end=shown, allow_nan=True)
    assert torch.equal(found, wanted[steps]) == settles


@pytest.mark.more
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_of_graphs_is_found(bundle: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, told = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, lambda *_: None)
    device = Simulated()
    with weights_on(device, {"strategy": "stream"}), diffkiln.load(bundle) as pipe:
        pipe.executor.graphs = Graphs(STEPWISE, torch.device("cpu"), Capture(device))
        with pytest.raises(Incompatible, match=told):
            drawn(pipe, STEPS[1])


@pytest.mark.more
def test_graphs_and_calls_without_them_take_turns(bundle: Path, wanted: dict[int, torch.Tensor]) -> None:
    device, (first, second) = Simulated(), STEPS
    with weights_on(device, {"strategy": "stream"}), diffkiln.load(bundle) as pipe:
        graphs = pipe.executor.graphs = Graphs(STEPWISE, torch.device("cpu"), Capture(device))
        assert torch.equal(drawn(pipe, first), wanted[first])
        for kept, steps in ((None, second), (graphs, first), (None, first), (graphs, first)):
            pipe.executor.graphs = kept
            assert torch.equal(drawn(pipe, steps), wanted[steps])
    assert device.races == []


@pytest.fixture
def streamed(bundle: Path) -> Iterator[Any]:
    with diffkiln.load(bundle) as pipe:
        yield pipe


def addresses(pipe: Any) -> dict[str, int]:
    return {name: tensor.data_ptr() for key in pipe.executor.store.held() for name, tensor in entries(pipe, key)}


def entries(pipe: Any, key: Any) -> list[tuple[str, torch.Tensor]]:
    return [(f"{key[0]}.{name}", tensor) for name, tensor in pipe.executor.store.get(key).items()]


def test_many_calls_neither_grow_nor_change_an_address(streamed: Any) -> None:
    seen: dict[str, int] = {}
    store = streamed.executor.store
    for _ in range(10):
        for steps in STEPS:
            drawn(streamed, steps)
            for name, address in addresses(streamed).items():
                assert seen.setdefault(name, address) == address
    assert store.bytes_peak == store.bytes_now


@pytest.mark.parametrize("limit", [None, 2_800_000, 3_500_000, 10_000_000])
def test_what_is_planned_is_what_happens(bundle: Path, limit: int | None) -> None:
    plans = plan_memory(bundle, max_memory=limit)
    with diffkiln.load(bundle, max_memory=limit) as pipe:
        store = pipe.executor.store
        for steps, calls in zip(STEPS, plans.values(), strict=True):
            plan = calls["call"]
            assert plan.residency.strategy == "stream"
            assert limit is None or plan.residency.peak <= limit
            drawn(pipe, steps)
            before = store.bytes_brought
            drawn(pipe, steps)
            assert store.bytes_brought - before == plan.residency.brought
            weights = {
                total - moment.results for total, moment in zip(plan.residency.memory, plan.moments, strict=True)
            }
            assert {store.bytes_now + constants(pipe)} == weights


def constants(pipe: Any) -> int:
    return sum(row.size for row in pipe.bundle.manifest.files if row.path.endswith("constants.safetensors"))


def test_a_limit_that_no_slots_keep_says_what_they_need(bundle: Path) -> None:
    with pytest.raises(Incompatible, match=r"max_memory: found 100,000 bytes, required [\d,]+.*the largest, of") as no:
        diffkiln.load(bundle, max_memory=100_000)
    needed = int(str(no.value).partition("required ")[2].split(", for")[0].replace(",", ""))
    (first, *_) = plan_memory(bundle, max_memory=needed).values()
    assert first["call"].residency.peak <= needed
    with pytest.raises(Incompatible, match="max_memory"):
        plan_memory(bundle, max_memory=needed - 1)


def test_the_command_says_that_they_stream(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(bundle)]) == 0
    assert "weights come through slots" in capsys.readouterr().out


def test_a_preview_takes_turns_with_the_call(bundle: Path, wanted: dict[int, torch.Tensor]) -> None:
    shown = []

    def show(pipe: Any, step: int, *_: object) -> None:
        shown.append(pipe.preview("pt").images if step == 2 else None)

    with diffkiln.load(bundle) as pipe:
        assert torch.equal(drawn(pipe, STEPS[0], callback_on_step_end=show), wanted[STEPS[0]])
    assert len([picture for picture in shown if picture is not None]) == 1
