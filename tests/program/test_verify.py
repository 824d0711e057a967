"""The verifier: every rule, broken once, names the program, the operation and the rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffkiln.errors import VerifyError
from diffkiln.program import CALL, NOISE, REGION, Input, Op, Ref, TensorType, verify
from diffkiln.program.verify import verify_module, verify_types
from tests.program.programs import BLOCK, BODY, F4, MODULE, PIPELINE


def with_op(program, op, **types):
    return replace(program, ops=(*program.ops, op), types={**program.types, "%9": F4, **types})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (replace(BLOCK, inputs=(*BLOCK.inputs, Input("%x", F4))), "two inputs have one name"),
        (with_op(BLOCK, Op("aten.svd.default", (Ref("%x"),), ("%9",))), "not in the closed list"),
        (with_op(BLOCK, Op("prim.device", (Ref("%x"),), ("%9",))), "no such operation"),
        (with_op(BLOCK, Op("aten.neg.default", (Ref("%8"),), ("%9",))), "has no type"),
        (with_op(BLOCK, Op("aten.neg.default", (Ref("%9"),), ("%9",))), "used before it is defined"),
        (with_op(BLOCK, Op("aten.neg.default", (Ref("%x"),), ("%2",))), "defined twice"),
        (with_op(BLOCK, Op("aten.neg.default", (Ref("%x"),), ("9",))), "not a value name"),
        (with_op(BLOCK, Op(NOISE, (), ("%9",), attrs={"shape": [1], "dtype": "float32"})), "only the call"),
        (with_op(BLOCK, Op(REGION, (), ("%9",), attrs={"region": "Block"})), "lacks"),
        (replace(BLOCK, outputs=(Ref("%8"),)), "its outputs"),
    ],
)
def test_rules_of_a_region(program, message):
    with pytest.raises(VerifyError, match=message):
        verify(program)


def test_calls_must_have_a_callee_with_as_many_values():
    with pytest.raises(VerifyError, match="there is no region Other"):
        verify(
            with_op(BODY, Op(REGION, (), ("%9",), attrs={"region": "Other", "instance": "x"})), regions=MODULE.regions
        )
    wrong = Op(REGION, (Ref("%x"), Ref("%x")), ("%9",), attrs={"region": "Block", "instance": "x"})
    with pytest.raises(VerifyError, match="takes 1 values and gives 1, here 2 and 1"):
        verify(with_op(BODY, wrong), regions=MODULE.regions)
    call = Op(CALL, (), ("%9",), attrs={"component": "unet", "program": "unet"})
    with pytest.raises(VerifyError, match="no component program unet/unet"):
        verify(with_op(PIPELINE, call), modules={"transformer": MODULE})


def test_module_is_verified_with_its_regions():
    verify_module(MODULE)
    with pytest.raises(VerifyError):
        verify_module(replace(MODULE, regions={}))


def test_types_at_calls_must_agree():
    verify_types(BODY, MODULE.regions)
    other = {"Block": replace(BLOCK, inputs=(Input("%x", TensorType("float32", (9, 4))),))}
    with pytest.raises(VerifyError, match=r"%x is float32\[2,4\], %x of 'Block' takes float32\[9,4\]"):
        verify_types(BODY, other)
