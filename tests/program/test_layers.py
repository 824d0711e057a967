"""Ranges of blocks that one process each runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffkiln.program import FROM_ONE, REGION, SHARD, Input, Module, Op, Program, Ref, TensorType, verify_module
from diffkiln.program.inference import infer_types
from diffkiln.program.layers import by_ranges, own_module, shared_out, sizes_of

TYPE = TensorType("float32", (2, 3))
OWNERS = {"blocks.0": 0, "blocks.1": 0, "blocks.2": 1, "blocks.3": 2}


def block(name: str) -> Program:
    ops = (Op("aten.mul.Tensor", (Ref("%x"), Ref("@w")), ("%y",)),)
    return Program(name, (Input("%x", TYPE),), ops, (Ref("%y"),), dict.fromkeys(("%x", "@w", "%y"), TYPE))


def net() -> Module:
    """Four blocks, of which the last is of another kind; before the second the result of the first is changed, and
    the one of the third is read again at the end."""

    def run(at: int, given: str, region: str = "block") -> Op:
        return Op(REGION, (Ref(given),), (f"%{at}",), attrs={"region": region, "instance": f"blocks.{at}"})

    ops = (
        Op("aten.mul.Tensor", (Ref("%x"), Ref("@before")), ("%in",)),
        run(0, "%in"),
        Op("aten.mul.Tensor", (Ref("%0"), Ref("@between")), ("%changed",)),
        run(1, "%changed"),
        Op("aten.neg.default", (Ref("%1"),), ("%negative",)),
        run(2, "%negative"),
        run(3, "%2", "other"),
        Op("aten.add.Tensor", (Ref("%3"), Ref("%2")), ("%out",)),
    )
    names = ["%x", "@before", "@between", *(name for op in ops for name in op.outputs)]
    program = Program("net.forward", (Input("%x", TYPE),), ops, (Ref("%out"),), dict.fromkeys(names, TYPE))
    return Module("net", {program.name: program}, {"block": block("block"), "other": block("other")})


def shared() -> Module:
    module = net()
    programs = {name: by_ranges(program, OWNERS, 3) for name, program in module.programs.items()}
    return replace(module, programs=programs)


def names_of(module: Module) -> list[str]:
    (program,) = module.programs.values()
    return [op.attrs.get("instance", op.name) for op in program.ops]


def test_each_range_ends_with_one_exchange():
    module = shared()
    verify_module(module)
    (program,) = module.programs.values()
    infer_types(program)
    given = [op for op in program.ops if op.name == FROM_ONE]
    assert [op.attrs for op in given] == [{"axis": "layers", "count": 3, "index": index} for index in range(3)]
    assert [op.outputs for op in given] == [("%1",), ("%2",), ("%3",)]
    assert given[0].args == (Ref("%1.own"),)


def test_a_process_runs_its_range_and_takes_part_in_all_exchanges():
    first, second, third = (own_module(shared(), index) for index in range(3))
    for part in (first, second, third):
        verify_module(part)
        assert names_of(part).count(FROM_ONE) == 3
    assert [name for name in names_of(first) if "blocks" in name] == ["blocks.0", "blocks.1"]
    assert [name for name in names_of(second) if "blocks" in name] == ["blocks.2"]
    assert [name for name in names_of(third) if "blocks" in name] == ["blocks.3"]
    assert (set(first.regions), set(second.regions), set(third.regions)) == ({"block"}, {"block"}, {"other"})


def test_what_follows_within_a_range_is_the_ranges_too():
    weights = [{name for name, _ in own_module(shared(), index).weight_types()} for index in range(3)]
    assert weights == [{"before", "between", "blocks.0.w", "blocks.1.w"}, {"blocks.2.w"}, {"blocks.3.w"}]


def test_a_component_without_ranges_stays_as_it_is():
    module = net()
    assert own_module(module, 1) is module


def test_blocks_are_shared_out_by_their_bytes():
    assert sizes_of(net()) == dict.fromkeys(OWNERS, 24)
    assert shared_out(sizes_of(net()), 2) == {"blocks.0": 0, "blocks.1": 0, "blocks.2": 1, "blocks.3": 1}


def test_what_processes_share_otherwise_is_refused():
    attrs = {"axis": "sequence", "count": 2, "dim": 0}
    half = TensorType("float32", (1, 3))
    ops = (Op(SHARD, (Ref("%x"),), ("%y",), attrs=attrs),)
    program = Program("net", (Input("%x", TYPE),), ops, (Ref("%y"),), {"%x": TYPE, "%y": half})
    with pytest.raises(ValueError, match="processes share %y of net already"):
        by_ranges(program, {}, 2)
