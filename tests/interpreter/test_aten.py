"""The interpreter: programs run operation by operation, on torch alone."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from diffkiln.errors import Incompatible, VerifyError
from diffkiln.interpreter.aten import Interpreter, check_schemas, dtype_name, dtype_of, overload, schemas, type_of
from diffkiln.program import Op, Ref, TensorType
from diffkiln.program.operators import OPERATORS
from tests.program.programs import BLOCK, BODY, F4, MODULE, PIPELINE

X = torch.arange(8.0).reshape(2, 4)
WEIGHTS = {f"blocks.{index}.proj.weight": torch.full((4, 4), float(index + 1)) for index in range(2)}
CONSTANTS = {"abc": torch.ones(2, 4)}


def block(x, weight):
    return torch.nn.functional.linear(x, weight) + 2 * CONSTANTS["abc"]


def test_weights_are_looked_up_under_a_prefix_and_constants_by_key():
    replay = Interpreter(BLOCK)
    for index in range(2):
        (got,) = replay([X], WEIGHTS, CONSTANTS, f"blocks.{index}.")
        assert torch.equal(got, block(X, WEIGHTS[f"blocks.{index}.proj.weight"]))


def test_special_operations_nested_arguments_and_several_results():
    def region(op):
        inner = Interpreter(MODULE.regions[op.attrs["region"]])
        return lambda *inputs: inner(inputs, WEIGHTS, CONSTANTS, f"{op.attrs['instance']}.")

    (got,) = Interpreter(BODY, special={"region": region})([X])
    assert torch.equal(got, X)  # the second half of [blocks(x), x]


def test_literals_become_torch_objects_and_scalars_are_values():
    special = {
        "noise": lambda op: lambda: [torch.ones(op.attrs["shape"])],
        "call": lambda _: lambda x: [x + 1],
        "step_end": lambda _: lambda x: [x],
    }
    (got,) = Interpreter(PIPELINE, special=special)([torch.zeros(1, 4, dtype=torch.int64), 3.5])
    assert torch.equal(got, torch.full((2, 4), 4.5))


def test_values_are_let_go_after_their_last_use():
    seen = []

    def watch(_op):
        def run(x):
            seen.append(weakref.ref(x))
            return [x * 2]

        return run

    chain = tuple(Op("call", (Ref(f"%{i}"),), (f"%{i + 1}",)) for i in range(3))
    program = replace(BLOCK, ops=(Op("aten.neg.default", (Ref("%x"),), ("%0",)), *chain), outputs=(Ref("%3"),))
    alive = []

    def counting(op):
        run = watch(op)

        def count(x):
            alive.append(sum(ref() is not None for ref in seen))
            return run(x)

        return count

    Interpreter(program, special={"call": counting})([X])
    assert max(alive) <= 1


def test_wrong_number_of_inputs_is_an_error():
    with pytest.raises(ValueError):
        Interpreter(BLOCK)([X, X], WEIGHTS, CONSTANTS, "blocks.0.")


def test_operators_outside_the_list_cannot_be_had():
    for name in ("aten.add_.Tensor", "aten.bernoulli.default", "aten.add.out"):
        with pytest.raises(VerifyError):
            overload(name)
    with pytest.raises(VerifyError, match="not in the closed list"):
        overload("aten.add.NoSuchOverload")


def test_operator_that_this_torch_has_not_is_incompatible(monkeypatch):
    monkeypatch.setitem(OPERATORS, "aten.add.NoSuchOverload", OPERATORS["aten.add.Tensor"])
    with pytest.raises(Incompatible, match="no operator"):
        overload("aten.add.NoSuchOverload")


def test_schemas_are_compared_found_against_required():
    recorded = schemas([BLOCK, BODY])
    assert set(recorded) == {"aten.linear.default", "aten.add.Tensor", "aten.cat.default", "aten.split.Tensor"}
    check_schemas(recorded)
    recorded["aten.add.Tensor"] = "aten::add.Tensor(Tensor self) -> Tensor"
    with pytest.raises(
        Incompatible, match=r"aten\.add\.Tensor: found aten::add.*, required aten::add\.Tensor\(Tensor self\)"
    ):
        check_schemas(recorded)


def test_types_have_names():
    assert type_of(X) == F4
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_of("float8_e4m3fn") is torch.float8_e4m3fn
    assert TensorType("float32", (2, 4)) == F4
    for name in ("float31", "nn", "__name__"):
        with pytest.raises(VerifyError):
            dtype_of(name)
