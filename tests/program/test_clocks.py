"""Virtual time: what each process computes, sends and waits for, by numbers that can be added up by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from diffkiln.program import ALL_GATHER, CALL, REGION, STEP, Input, Mesh, Module, Op, Program, Ref, TensorType
from diffkiln.program.clocks import Clock, Link, clocks_of
from diffkiln.program.first import by_first
from diffkiln.program.layers import by_ranges
from diffkiln.program.work import Ceilings

TWO = {"axis": "sequence", "count": 2}
MESH = Mesh({"sequence": 2})
#: A product of [2, 3] and [3, 3] is 36 operations: 36 seconds, as the device does one a second.
PRODUCT, SLOW = 36, Ceilings({32: 1.0})
ROWS, SQUARE = TensorType("float32", (2, 3)), TensorType("float32", (3, 3))


def component(name: str, *, exchange: bool = False) -> Module:
    """A product, and for two processes an exchange of its result of 24 bytes and another product."""
    ops = [Op("aten.mm.default", (Ref("%x"), Ref("@w")), ("%y",))]
    if exchange:
        ops.append(Op(ALL_GATHER, (Ref("%y"),), ("%z", "%other"), attrs=TWO))
        ops.append(Op("aten.mm.default", (Ref("%other"), Ref("@w")), ("%last",)))
    types = {"@w": SQUARE, **dict.fromkeys(("%x", "%y", "%z", "%other", "%last"), ROWS)}
    program = Program(name, (Input("%x", ROWS),), tuple(ops), (Ref(ops[-1].outputs[0]),), types)
    return Module(name, {name: program})


def call(steps: int, encodes: bool = False) -> Program:
    """Steps of the denoiser, after a call of the encoder if there is one."""
    ops: list[Op] = []
    last = "%in"

    def run(name: str) -> None:
        nonlocal last
        ops.append(Op(CALL, (Ref(last),), (f"%{len(ops)}",), attrs={"component": name, "program": name}))
        last = ops[-1].outputs[0]

    if encodes:
        run("encoder")
    for step in range(steps):
        run("denoiser")
        ops.append(Op(STEP, (Ref(last),), (f"%{len(ops)}",), attrs={"step": step, "timestep": 1.0}))
        last = ops[-1].outputs[0]
    types = dict.fromkeys(("%in", *(op.outputs[0] for op in ops)), ROWS)
    return Program("call", (Input("%in", ROWS),), tuple(ops), (Ref(last),), types)


MODULES = {"encoder": component("encoder"), "denoiser": component("denoiser", exchange=True)}


def test_one_process_computes_alone():
    modules = {"denoiser": component("denoiser")}
    assert clocks_of(call(3), modules, SLOW) == [Clock(3 * PRODUCT, 3 * PRODUCT, steps=[36.0, 72.0, 108.0])]


def test_an_exchange_takes_a_latency_and_its_bytes_over_the_link():
    found = clocks_of(call(3), MODULES, SLOW, MESH, Link(bandwidth=12.0, latency=5.0))
    step = 2 * PRODUCT + 5 + 24 / 12
    assert [clock.now for clock in found] == [3 * step] * 2
    assert [clock.computing for clock in found] == [6 * PRODUCT] * 2
    assert [clock.exchanging for clock in found] == [21] * 2
    assert [clock.step for clock in found] == [step] * 2


def test_processes_wait_for_what_the_first_one_runs():
    shared = by_first(call(1, encodes=True), {"encoder"}, 2)
    first, other = clocks_of(shared, MODULES, SLOW, MESH, Link(bandwidth=24.0, latency=0.0))
    assert (first.waiting, other.waiting) == (0, PRODUCT)
    assert (first.computing, other.computing) == (3 * PRODUCT, 2 * PRODUCT)
    assert first.now == other.now == 3 * PRODUCT + 1 + 1


def test_a_process_waits_while_another_one_runs_its_layers():
    """Two products, one for each process, each followed by an exchange of 24 bytes."""
    product = Program(
        "block",
        (Input("%x", ROWS),),
        (Op("aten.mm.default", (Ref("%x"), Ref("@w")), ("%y",)),),
        (Ref("%y"),),
        {"%x": ROWS, "@w": SQUARE, "%y": ROWS},
    )
    names = ["%x", "%a", "%b"]
    ops = tuple(
        Op(REGION, (Ref(x),), (y,), attrs={"region": "block", "instance": f"blocks.{index}"})
        for index, (x, y) in enumerate(pairwise(names))
    )
    program = Program("denoiser", (Input("%x", ROWS),), ops, (Ref("%b"),), dict.fromkeys(names, ROWS))
    program = by_ranges(program, {"blocks.0": 0, "blocks.1": 1}, 2)
    modules = {"denoiser": Module("denoiser", {"denoiser": program}, {"block": product})}
    first, second = clocks_of(call(1), modules, SLOW, Mesh({"layers": 2}), Link(bandwidth=24.0, latency=0.0))
    assert (first.computing, first.waiting, first.exchanging) == (PRODUCT, PRODUCT, 2)
    assert (second.computing, second.waiting, second.exchanging) == (PRODUCT, PRODUCT, 2)
    assert first.now == second.now == 2 * PRODUCT + 2


def test_a_call_of_one_step_has_no_time_between_steps():
    assert clocks_of(call(1), {"denoiser": component("denoiser")}, SLOW)[0].step is None


def test_work_and_memory_are_compared_operation_by_operation():
    modules = {"denoiser": component("denoiser")}
    (clock,) = clocks_of(call(1), modules, Ceilings({32: 1.0}, memory=1.0))
    assert clock.now == pytest.approx(4 * (6 + 9 + 6))
