"""Tiles are found by what operations need of each other, and shared among processes of one axis and of two."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffkiln.interpreter.aten import Interpreter
from diffkiln.passes.tiling import parts_of, spread_parts
from diffkiln.program import Input, Mesh, Op, Program, Ref, TensorType, verify
from diffkiln.program.inference import infer_types
from diffkiln.runtime.processes import Group, shared_operations
from diffkiln.runtime.processes.threads import in_threads

WIDTH = 4


def f32(*shape: int) -> TensorType:
    return TensorType("float32", shape)


def decoder(sizes: list[int], joined: bool = False) -> Program:
    """A decoder of [1, sum of sizes, 4] in tiles of these sizes: slice, scale, two layers with an activation between;
    then all are put together. Where they are `joined`, each takes a row of the one before it."""
    ops: list[Op] = []
    types = {"%x": f32(1, sum(sizes), WIDTH), "@a": f32(WIDTH, WIDTH), "@b": f32(WIDTH, WIDTH)}
    last: list[Ref] = []
    start = 0

    def add(name: str, *args: object, size: int) -> Ref:
        output = f"%{len(ops)}"
        types[output] = f32(1, size, WIDTH)
        ops.append(Op(name, args, (output,)))  # type: ignore[arg-type]
        return Ref(output)

    for size in sizes:
        tile = add("aten.slice.Tensor", Ref("%x"), 1, start, start + size, size=size)
        tile = add("aten.mul.Tensor", tile, 0.5, size=size)
        tile = add("aten.linear.default", tile, Ref("@a"), size=size)
        tile = add("aten.relu.default", tile, size=size)
        if joined and last:
            tile = add("aten.add.Tensor", tile, last[-1], size=size)
        last.append(add("aten.linear.default", tile, Ref("@b"), size=size))
        start += size
    whole = add("aten.cat.default", tuple(last), 1, size=start)
    return Program("decode", (Input("%x", types["%x"]),), tuple(ops), (whole,), types)


def test_each_tile_is_a_part_from_the_first_weights_to_the_last():
    program = decoder([3, 3, 2])
    parts = parts_of(program)
    assert [len(part.positions) for part in parts] == [3, 3, 3]
    assert [part.inputs for part in parts] == [("%1",), ("%6",), ("%11",)]
    assert [part.outputs for part in parts] == [("%4",), ("%9",), ("%14",)]
    assert parts[0].form == parts[1].form != parts[2].form


def test_what_hangs_together_is_one_part():
    assert len(parts_of(decoder([3, 3], joined=True))) == 1
    assert len(parts_of(decoder([3]))) == 1


def test_parts_with_other_weights_are_not_alike():
    program = decoder([3, 3])
    ops = list(program.ops)
    ops[2] = Op(ops[2].name, (ops[2].args[0], Ref("@b")), ops[2].outputs)
    other = Program(program.name, program.inputs, tuple(ops), program.outputs, program.types)
    assert len({part.form for part in parts_of(other)}) == 2


@pytest.mark.parametrize(
    ("counts", "sizes", "rounds"),
    [
        ({"guidance": 2}, [3, 3, 3], 2),
        ({"sequence": 4}, [3, 3, 3, 2, 2], 2),
        ({"guidance": 2, "sequence": 2}, [3, 3, 3, 3, 3, 2], 2),
        ({"guidance": 2, "sequence": 3}, [2, 2, 2, 2, 2, 2, 2], 2),
    ],
)
def test_processes_that_share_tiles_get_what_one_computes(counts, sizes, rounds):
    program, mesh = decoder(sizes), Mesh(counts)
    shared, own = spread_parts(program, parts_of(program), mesh)
    verify(shared, regions={})
    infer_types(shared)
    assert own == rounds
    alone = sum(count for count in Counter(sizes).values() if count == 1)
    assert sum(op.name == "aten.linear.default" for op in shared.ops) == 2 * (rounds + alone)
    value = torch.randn(1, sum(sizes), WIDTH)
    weights = {name: torch.randn(WIDTH, WIDTH) for name in "ab"}
    (wanted,) = Interpreter(program)([value], weights)

    def run(group: Group) -> bool:
        (found,) = Interpreter(shared, special=shared_operations(group))([value], weights)
        return torch.equal(found, wanted)

    assert in_threads(mesh, run) == [True] * mesh.size


def test_tiles_of_different_sizes_stay_as_they_are():
    program = decoder([3, 2])
    shared, own = spread_parts(program, parts_of(program), Mesh({"sequence": 2}))
    assert (len(shared.ops), own) == (len(program.ops), 0)
