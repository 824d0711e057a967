"""Calls of one component program that do not need each other are shared among processes, where that saves more than it
sends."""

from __future__ import annotations

import pytest
import torch

from diffkiln.interpreter.aten import Interpreter
from diffkiln.passes.tiling import calls_of, spread_preambles
from diffkiln.program import ALL_GATHER, CALL, Input, Mesh, Module, Op, Program, Ref, TensorType, verify
from diffkiln.program.exchange import exchanged
from diffkiln.program.inference import infer_types
from diffkiln.runtime.processes import Group, shared_operations
from diffkiln.runtime.processes.threads import in_threads

WIDTH = 8
ROW, WIDE = TensorType("float32", (1, WIDTH)), TensorType("float32", (1, 2 * WIDTH))


def net(ahead: bool = True) -> Module:
    """A component that makes two rows and a wide one of a row that a step has and of one that all have."""
    types = dict.fromkeys(("%step", "%text", "%sum", "%one", "%two"), ROW) | {"%wide": WIDE}
    types |= dict.fromkeys(("@a", "@b"), TensorType("float32", (WIDTH, WIDTH)))
    types["@c"] = TensorType("float32", (2 * WIDTH, WIDTH))
    ops = [Op("aten.add.Tensor", (Ref("%step"), Ref("%text")), ("%sum",))]
    named = (("one", "a"), ("wide", "c"), ("two", "b"))
    ops += [Op("aten.linear.default", (Ref("%sum"), Ref(f"@{weight}")), (f"%{name}",)) for name, weight in named]
    inputs = (Input("%step", ROW), Input("%text", ROW))
    outputs = tuple(Ref(f"%{name}") for name, _ in named)
    return Module("net", {"net.timed": Program("net.timed", inputs, tuple(ops), outputs, types, ahead=ahead)})


def called(steps: int, joined: bool = False) -> Program:
    """A call of the component for each step, with a constant, and for `joined` ones a row that the one before made."""
    types: dict[str, TensorType] = {"%text": ROW}
    ops: list[Op] = []
    outputs: list[Ref] = []
    text = "%text"
    for step in range(steps):
        names = tuple(f"%{step}.{index}" for index in range(3))
        types |= {f"#t/{step}": ROW, names[0]: ROW, names[1]: WIDE, names[2]: ROW}
        attrs = {"component": "net", "program": "net.timed"}
        ops.append(Op(CALL, (Ref(f"#t/{step}"), Ref(text)), names, attrs=attrs))
        outputs += map(Ref, names)
        text = names[0] if joined else text
    source = {"kind": "tensor", "keyword": "text"}
    return Program("call", (Input("%text", ROW, source),), tuple(ops), tuple(outputs), types)


@pytest.mark.parametrize(
    ("counts", "steps", "own", "rounds"),
    [
        ({"sequence": 2}, 4, 2, 2),
        ({"sequence": 2}, 5, 3, 2),
        ({"sequence": 4}, 6, 2, 2),
        ({"guidance": 2, "sequence": 2}, 4, 1, 1),
    ],
)
def test_processes_that_share_calls_get_what_one_computes(counts, steps, own, rounds):
    """A call that is left over is made by all. In a round, rows of one size travel in one exchange."""
    call, module, mesh = called(steps), net(), Mesh(counts)
    shared, notes = spread_preambles(call, module, mesh)
    assert notes == [f"each process makes {own} of {steps} calls of net.timed"]
    verify(shared, modules={"net": module})
    infer_types(shared)
    assert sum(op.name == CALL for op in shared.ops) == own
    weights = {"a": torch.randn(WIDTH, WIDTH), "b": torch.randn(WIDTH, WIDTH), "c": torch.randn(2 * WIDTH, WIDTH)}
    constants = {f"t/{step}": torch.randn(1, WIDTH) for step in range(steps)}
    text = torch.randn(1, WIDTH)

    def drawn(program: Program, group: Group | None) -> list[torch.Tensor]:
        timed = Interpreter(module.programs["net.timed"])
        special = {**shared_operations(group), CALL: lambda op: lambda *values: timed(list(values), weights)}
        return list(Interpreter(program, special=special)([text], constants=constants))

    wanted = drawn(call, None)

    def run(group: Group) -> tuple[bool, int]:
        found = drawn(shared, group)
        return all(map(torch.equal, found, wanted)), group.sent

    predicted = sum(step.nbytes for step in exchanged(shared, {"net": module}))
    assert in_threads(mesh, run) == [(True, predicted)] * mesh.size
    gathers = 1 + counts["sequence"] if "guidance" in counts else 1
    assert sum(op.name == ALL_GATHER for op in shared.ops) == rounds * 2 * gathers
    assert predicted == rounds * (mesh.size - 1) * 4 * WIDTH * 4


def test_calls_that_need_each_other_are_not_shared():
    call = called(3, joined=True)
    assert [part.positions for part in calls_of(call, "net", "net.timed")] == [(0,)]
    assert spread_preambles(call, net(), Mesh({"sequence": 2})) == (call, [])


def test_calls_of_the_loop_are_not_shared():
    call = called(4)
    assert spread_preambles(call, net(ahead=False), Mesh({"sequence": 2})) == (call, [])


def test_calls_that_spare_less_than_they_send_are_made_by_all():
    """Two calls on 64 processes: each reads 1024 bytes of weights once less, and would send 128 to 63 others."""
    call = called(2)
    assert spread_preambles(call, net(), Mesh({"sequence": 64})) == (call, [])
    assert spread_preambles(call, net(), Mesh({"sequence": 2}))[1] == ["each process makes 1 of 2 calls of net.timed"]
