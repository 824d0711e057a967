"""Where the executor has what engines read, tried on "meta": what is there was put there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffkiln.errors import CallError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import CALL, NOISE, REGION, Input, Module, Op, Program, Ref, TensorType
from diffkiln.runtime.executor import Executor, _Component
from diffkiln.runtime.graphs import WHOLE, Graphs
from diffkiln.runtime.host_numbers import constants_on, read_on_host
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
    (found,) = executor(engine)(arithmetic()[1], [torch.zeros(4)], allow_nan=True)
    assert [tensor.device.type for tensor in engine.flat] == ["meta"] * 3
    assert [tuple(tensor.shape) for tensor in engine.flat] == [(4,), (), ()]
    assert found.device.type == "meta"


def test_arithmetic_is_given_numbers_on_the_host() -> None:
    program = Program(
        "step",
        (Input("%latents", _LATENTS),),
        (Op("aten.mul.Tensor", (Ref("%latents"), Ref("#sigma")), ("%0",)),),
        (Ref("%0"),),
        _TYPES,
    )
    constants = constants_on({"sigma": torch.tensor(2.0, dtype=torch.float64)}, META)
    seen: list[str] = []

    def mul(op: Op):
        return lambda *given: seen.extend(tensor.device.type for tensor in given) or [given[0] * given[1]]

    run = Interpreter(read_on_host(program, META), META, {"aten.mul.Tensor": mul})
    assert run([torch.zeros(4, device=META)], {}, constants)[0].device == META
    assert seen == ["meta", "cpu"]


@pytest.mark.parametrize(
    "op",
    [
        Op("aten.expand.default", (Ref("#sigma"), (4,)), ("%0",)),
        Op("aten.stack.default", ((Ref("#sigma"), Ref("#sigma"), Ref("#shift"), Ref("#sigma")),), ("%0",)),
        Op("aten.add.Tensor", (Ref("#sigma"), Ref("#shift")), ("%0",)),
        Op("aten.neg.default", (Ref("#sigma"),), ("%0",)),
    ],
    ids=lambda op: op.name,
)
def test_what_is_made_of_numbers_alone_is_on_the_device(op: Op) -> None:
    """Stable Diffusion makes its timesteps of one number and gives them to the U-Net with a tensor of the GPU."""
    kind = _NUMBER if "add" in op.name or "neg" in op.name else replace(_LATENTS, dtype="float64")
    inputs = Input("%latents", _LATENTS), Input("%sigma", kind)
    out = _LATENTS if kind is _NUMBER else kind
    types = {**_TYPES, "%sigma": kind, "%0": kind, "%1": out}
    product = Op("aten.mul.Tensor", (Ref("%latents"), Ref("%sigma")), ("%0",))
    program = Program("step", inputs, (product,), (Ref("%0"),), {**types, "%0": out})
    call = Op(CALL, (Ref("%latents"), Ref("%0")), ("%1",), attrs={"component": "scheduler", "program": "step"})
    made = executor(None)
    made.modules["scheduler"].programs["step"] = program  # type: ignore[index]
    (found,) = made(Program("call", (inputs[0],), (op, call), (Ref("%1"),), types), [torch.zeros(4)], allow_nan=True)
    assert found.device == META


def test_a_component_is_given_nothing_that_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither operation by operation nor in a graph, which cannot hold a copy from the host."""
    places: list[str] = []
    run = _Component.__call__

    def watched(self: _Component, *inputs: torch.Tensor) -> list[torch.Tensor]:
        places.extend(tensor.device.type for tensor in inputs)
        return run(self, *inputs)

    monkeypatch.setattr(_Component, "__call__", watched)
    for graphs in (None, Graphs(WHOLE, META, lambda run, _ready: ((lambda: None), run()))):
        executor(None, graphs)(arithmetic()[1], [torch.zeros(4)], allow_nan=True)
    assert places == ["meta"] * 4


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
