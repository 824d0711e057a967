"""What values depend on, by hand-written programs."""

from __future__ import annotations

from diffkiln.passes.hoisting.dependence import Depends, of_call, of_regions, spread
from diffkiln.passes.hoisting.phases import in_phases
from diffkiln.program import CALL, NOISE, REGION, Input, Module, Op, Program, Ref, TensorType

ROW = TensorType("float32", (1, 4))
LATENTS, REQUEST, SCHEDULE = Depends.LATENTS, Depends.REQUEST, Depends.SCHEDULE


def _program(name, inputs, ops, output):
    named = [*inputs, *(out for op in ops for out in op.outputs)]
    used = [ref.name for op in ops for ref in op.uses if not ref.is_computed]
    types = dict.fromkeys([*named, *used], ROW)
    return Program(name, tuple(Input(item, ROW) for item in inputs), tuple(ops), (Ref(output),), types)


def _add(a, b, result):
    return Op("aten.add.Tensor", (Ref(a), Ref(b)), (result,))


BLOCK = _program("Block", ["%x", "%c"], [_add("%c", "@w", "%s"), _add("%x", "%s", "%y")], "%y")


def _region(instance, x, c, result):
    return Op(REGION, (Ref(x), Ref(c)), (result,), attrs={"region": "Block", "instance": instance})


def test_a_result_depends_on_all_that_it_is_made_of():
    found = spread(BLOCK, [LATENTS, SCHEDULE | REQUEST])
    assert found["%s"] == SCHEDULE | REQUEST
    assert found["%y"] == LATENTS | SCHEDULE | REQUEST


def test_blocks_of_a_class_count_together_where_they_follow_the_latents():
    ops = [_region("0", "%x", "%t", "%1"), _region("1", "%1", "%p", "%2"), _region("2", "%p", "%t", "%3")]
    whole = _program("net", ["%x", "%t", "%p"], [*ops, _add("%2", "%3", "%4")], "%4")
    module = Module("net", {"net": whole}, {"Block": BLOCK})
    joint = of_regions(module, {"net": [LATENTS, SCHEDULE, REQUEST]})
    assert joint == {"Block": [LATENTS | SCHEDULE | REQUEST, SCHEDULE | REQUEST]}


def test_noise_and_results_of_the_component_are_latents():
    ops = [
        Op(NOISE, (), ("%noise",), attrs={"shape": [1, 4], "dtype": "float32"}),
        Op(CALL, (Ref("%prompt"),), ("%text",), attrs={"component": "text", "program": "text"}),
        Op(CALL, (Ref("%text"), Ref("#t")), ("%found",), attrs={"component": "net", "program": "net"}),
    ]
    found = of_call(_program("call", ["%prompt"], ops, "%found"), "net")
    assert (found["%noise"], found["%found"], found["#t"]) == (LATENTS | REQUEST, LATENTS | REQUEST, SCHEDULE)
    assert found["%text"] == REQUEST


def test_cheap_operations_stay_on_both_sides_of_a_cut():
    ops = [
        _add("%t", "@a", "%0"),
        Op("aten.linear.default", (Ref("%0"), Ref("@w")), ("%1",)),
        _add("%1", "@b", "%2"),
        _add("%x", "%2", "%3"),
    ]
    program = _program("net", ["%x", "%t"], ops, "%3")
    phased = in_phases(program, spread(program, [LATENTS, SCHEDULE]), {1})
    (table,) = phased.phases.values()
    assert (table.name, [op.outputs for op in table.ops]) == ("net.table", [("%0",), ("%1",)])
    assert [item.name for item in phased.rest.inputs] == ["%x", "%1"]
    assert [op.outputs for op in phased.rest.ops] == [("%2",), ("%3",)]
