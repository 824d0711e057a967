"""Two calls of a step in programs that are written out: which has the prompt, and what waits for both."""

from __future__ import annotations

import pytest

from diffkiln.passes.caching import call_sites_of
from diffkiln.passes.guiding import join, prompt_branch
from diffkiln.program import CALL, STEP, Builder, Input, Op, Program, Ref, TensorType
from diffkiln.record.constants import Constants

TYPE = TensorType("float32", (1, 2))
TEXTS = [{"rows": [{"keyword": "prompt"}]}, {"rows": [{"text": ""}]}]
INPUTS = tuple(Input(f"%t{index}", TYPE, {"kind": "tokens", "text": index, "key": "input_ids"}) for index in (0, 1))


def program(*ops: Op) -> Program:
    types = dict.fromkeys(["%t0", "%t1", *(name for op in ops for name in op.outputs)], TYPE)
    return Program("call", INPUTS, ops, (Ref(ops[-1].outputs[0]),), types, texts=TEXTS)  # type: ignore[arg-type]


def net(embeds: str, out: str) -> Op:
    return Op(CALL, (Ref("%t0"), Ref(embeds)), (out,), attrs={"component": "net", "program": "net"})


def op(name: str, out: str, *names: str) -> Op:
    return Op(f"aten.{name}", tuple(map(Ref, names)), (out,))


def end(name: str, out: str) -> Op:
    return Op(STEP, (Ref(name),), (out,), attrs={"step": 0, "timestep": 1.0})


def joined(call: Program, guided: bool) -> list[str]:
    made = join(call, "net", call_sites_of(call, "net", 1).sites, [guided], {}, Constants())
    return [f"{op.outputs[0]} = {op.name}({', '.join(ref.name for ref in op.args)})" for op in made.ops]  # type: ignore[union-attr]


FIRST = program(
    net("%t1", "%n"),
    op("neg.default", "%m", "%n"),
    net("%t0", "%p"),
    op("sub.Tensor", "%d", "%p", "%m"),
    end("%d", "%e"),
)


def test_the_call_with_the_prompt_is_the_one_that_stays():
    assert joined(FIRST, False) == [
        "%p = call(%t0, %t0)",
        "%m = aten.neg.default(%p)",
        "%d = aten.sub.Tensor(%p, %m)",
        "%e = step_end(%d)",
    ]


def test_the_call_with_the_prompt_comes_first():
    assert joined(FIRST, True)[:3] == ["%p = call(%t0, %t0)", "%n = call(%t0, %t1)", "%m = aten.neg.default(%n)"]


def test_calls_that_need_each_other_are_refused():
    call = program(net("%t1", "%n"), net("%n", "%p"), end("%p", "%e"))
    with pytest.raises(ValueError, match="the second call of net in step 0 needs what the first gives"):
        joined(call, True)


def test_two_calls_with_the_prompt_are_refused():
    call = program(
        op("neg.default", "%x", "%t0"),
        net("%t0", "%n"),
        net("%x", "%p"),
        op("sub.Tensor", "%d", "%p", "%n"),
        end("%d", "%e"),
    )
    with pytest.raises(ValueError, match="which of the two calls of net in a step has the prompt cannot be told"):
        joined(call, False)


def test_zeros_of_the_prompts_shape_are_no_prompt():
    zeros = op("zeros_like.default", "%z", "%t0")
    assert prompt_branch([[Ref("%z")], [Ref("%t0")]], Builder(program(zeros))) == 1
