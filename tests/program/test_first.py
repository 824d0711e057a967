"""Calls of components that the first process alone makes."""

from __future__ import annotations

import pytest

from diffkiln.program import CALL, FROM_FIRST, Input, Module, Op, Program, Ref, TensorType, for_others, verify
from diffkiln.program.first import by_first
from diffkiln.program.inference import infer_types

TYPE = TensorType("float32", (2, 3))


def encoder() -> Module:
    program = Program(
        "encoder.forward",
        (Input("%x", TYPE),),
        (Op("aten.mul.Tensor", (Ref("%x"), Ref("@w")), ("%y",)), Op("aten.neg.default", (Ref("%x"),), ("%z",))),
        (Ref("%y"), Ref("%z")),
        {"%x": TYPE, "@w": TYPE, "%y": TYPE, "%z": TYPE},
    )
    return Module("encoder", {program.name: program})


def call(*more: Op, result: str = "%encoded") -> Program:
    """A call that doubles its input, has it encoded, and uses the first of two results."""
    attrs = {"component": "encoder", "program": "encoder.forward"}
    ops = (
        Op("aten.add.Tensor", (Ref("%in"), Ref("%in")), ("%double",)),
        Op(CALL, (Ref("%double"),), ("%encoded", "%unused"), attrs=attrs),
        *more,
    )
    names = ("%in", "%double", "%encoded", "%unused", *(name for op in more for name in op.outputs))
    return Program("call", (Input("%in", TYPE),), ops, (Ref(result),), dict.fromkeys(names, TYPE))


def test_the_first_process_gives_what_is_used_to_all():
    more = Op("aten.neg.default", (Ref("%encoded"),), ("%result",))
    found = by_first(call(more, result="%result"), {"encoder"}, 4)
    assert [op.name for op in found.ops] == ["aten.add.Tensor", CALL, FROM_FIRST, "aten.neg.default"]
    given = found.ops[2]
    assert (given.args, given.attrs) == ((Ref(found.ops[1].outputs[0]),), {"count": 4})
    assert found.ops[3].args == (Ref(given.outputs[0]),)
    verify(found, modules={"encoder": encoder()})
    infer_types(found)


def test_the_others_take_it_and_compute_nothing_for_it():
    found = for_others(by_first(call(), {"encoder"}, 2))
    assert [op.name for op in found.ops] == ["aten.zeros.default", FROM_FIRST]
    assert [item.name for item in found.inputs] == ["%in"]
    infer_types(found)


def test_another_component_stays_as_it_is():
    assert by_first(call(), {"vae"}, 2) == call()
    assert for_others(call()).ops == call().ops


def test_a_call_that_reads_the_weights_itself_is_refused():
    plain = call(Op("aten.mul.Tensor", (Ref("%encoded"), Ref("@encoder/w")), ("%result",)), result="%result")
    program = Program("call", plain.inputs, plain.ops, plain.outputs, {**plain.types, "@encoder/w": TYPE})
    with pytest.raises(ValueError, match="the call reads w of encoder itself"):
        by_first(program, {"encoder"}, 2)
