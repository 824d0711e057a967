"""Where the executor has what engines read, tried on "meta": what is there was put there."""

from __future__ import annotations

import pytest
import torch

from diffkiln.errors import CallError
from diffkiln.program import CALL, NOISE, REGION, Input, Module, Op, Program, Ref, TensorType
from diffkiln.runtime.executor import Executor, _Component
from diffkiln.runtime.graphs import WHOLE, Graphs
from diffkiln.runtime.weights import WeightStore

META = torch.device("meta")
_LATENTS, _NUMBER = TensorType("float32", (4,)), TensorType("float64", ())
_TYPES = {"%latents": _LATENTS, "%sigma": _NUMBER, "#shift": _NUMBER, "#sigma": _NUMBER, "%0": _LATENTS, "%1": _LATENTS}


class Seen:
    """An engine that keeps what it is given."""

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        self.flat = flat
        return [flat[0] + 1.0]

    def check(self, flat) -> None:
        """Takes whatever there is."""


def arithmetic() -> tuple[Module, Program]:
    """A component of one region that takes a number and has another as a constant, and a call of it."""
    inputs = Input("%latents", _LATENTS), Input("%sigma", _NUMBER)
    ops = (
        Op("aten.mul.Tensor", (Ref("%latents"), Ref("%sigma")), ("%0",)),
        Op("aten.add.Tensor", (Ref("%0"), Ref("#shift")), ("%1",)),
    )
    region = Program("step", inputs, ops, (Ref("%1"),), _TYPES)
    attrs = {"region": "step", "instance": ""}
    whole = Op(REGION, (Ref("%latents"), Ref("%sigma")), ("%0",), attrs=attrs)
    program = Program("step", inputs, (whole,), (Ref("%0"),), _TYPES)
    call = Op(CALL, (Ref("%latents"), Ref("#sigma")), ("%0",), attrs={"component": "scheduler", "program": "step"})
    return (
        Module("scheduler", {"step": program}, {"step": region}),
        Program("call", (inputs[0],), (call,), (Ref("%0"),), _TYPES),
    )


def executor(engine: Seen | None, graphs: Graphs | None = None) -> Executor:
    module, _ = arithmetic()
    constants = {name: torch.tensor(2.0, dtype=torch.float64) for name in ("sigma", "shift")}
    engines = {("scheduler", "step"): engine} if engine else {}
    store = WeightStore(None, {}, META, None)  # type: ignore[arg-type]
    return Executor({"scheduler": module}, store, constants, engines, META, graphs=graphs)


def test_an_engine_is_given_numbers_on_its_device() -> None:
    engine = Seen()
    (found,) = executor(engine)(arithmetic()[1], [torch.zeros(4)])
    assert [tensor.device.type for tensor in engine.flat] == ["meta"] * 3
    assert [tuple(tensor.shape) for tensor in engine.flat] == [(4,), (), ()]
    assert found.device.type == "meta"


def test_operators_are_given_numbers_on_the_host() -> None:
    made = executor(None)
    assert {tensor.device.type for tensor in made.constants.values()} == {"cpu"}
    assert made(arithmetic()[1], [torch.zeros(4)])[0].device.type == "meta"


def test_what_is_recorded_in_a_graph_copies_no_number_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    run = _Component.__call__

    def watched(self: _Component, *inputs: torch.Tensor) -> list[torch.Tensor]:
        places.extend(tensor.device.type for tensor in inputs)
        return run(self, *inputs)

    monkeypatch.setattr(_Component, "__call__", watched)
    for graphs in (None, Graphs(WHOLE, META, lambda run: ((lambda: None), run()))):
        executor(None, graphs)(arithmetic()[1], [torch.zeros(4)])
    assert places == ["meta", "cpu", "meta", "meta"]


def test_noise_that_a_pipeline_draws_without_the_callers_generator() -> None:
    attrs = {"shape": [4], "dtype": "float32"}
    ops = Op(NOISE, (), ("%0",), attrs=attrs), Op(NOISE, (), ("%1",), attrs=attrs | {"seeded": False})
    call = Program("call", (), ops, (Ref("%0"), Ref("%1")), _TYPES)
    store = WeightStore(None, {}, torch.device("cpu"), None)  # type: ignore[arg-type]
    run = Executor({}, store, {}, {}, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = run(call, [], torch.Generator().manual_seed(7))
        torch.manual_seed(3)
        own = torch.randn(4)
    assert torch.equal(found[0], torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(found[1], own)


def test_latents_are_asked_for_where_no_step_ends() -> None:
    with pytest.raises(CallError, match="output_type: this pipeline does not show its latents"):
        executor(None)(arithmetic()[1], [torch.zeros(4)], latents=True)
