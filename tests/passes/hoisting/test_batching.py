"""A program for the rows of several calls: those of each call, or refused where rows meet."""

from __future__ import annotations

import pytest
import torch

from diffkiln.interpreter.aten import Interpreter
from diffkiln.passes.hoisting.batching import Batch, RowsMeet
from diffkiln.program import Program
from tests.exporters.regions import Writer

CALLS = 3


def modulation() -> Program:
    """What modulates a block: rows of features, a layer, and parts along the features."""
    w = Writer()
    x, y = w.value("%x", 2, 8), w.value("%y", 2, 8)
    rows = w.op("silu.default", w.op("add.Tensor", x, y))
    layer = w.op("linear.default", rows, w.value("@weight", 12, 8), w.value("@bias", 12))
    shaped = w.op("view.default", w.op("mul.Tensor", layer, w.value("@scale", 12)), (2, 3, 4))
    return w.program("Modulation", w.op("unsqueeze.default", w.op("slice.Tensor", shaped, 1, 1, 3), 1))


def tokens() -> Program:
    """What refines a text: norms and means of its tokens, a product with a matrix, and the greatest features."""
    w = Writer()
    x = w.op("rms_norm.default", w.value("%x", 2, 5, 8), (8,), w.value("@scale", 8))
    mean = w.op("mean.dim", w.op("layer_norm.default", x, (8,)), (1, -1), True)
    product = w.op("matmul.default", w.op("mul.Tensor", x, mean), w.value("@weight", 8, 6))
    greatest = w.op("amax.default", product, (-1,), True)
    return w.program(
        "Refined", w.op("sum.dim_IntList", w.op("softmax.int", w.op("sub.Tensor", product, greatest), 1), (2,))
    )


def _values(program: Program) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(item.type.shape, generator=draw) for item in program.inputs] for _ in range(CALLS)]
    weights = {name: torch.randn(program.types[f"@{name}"].shape, generator=draw) for name in program.weights}
    return inputs, weights


def _run(program: Program, inputs: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(Interpreter(program, torch.device("cpu"))(inputs, weights, {})))


@pytest.mark.parametrize("make", [modulation, tokens])
def test_rows_of_several_calls_are_those_of_each(make):
    program = make()
    inputs, weights = _values(program)
    batched = Batch({}, CALLS).program(program)
    joined = [torch.cat(each) for each in zip(*inputs, strict=True)]
    wanted = torch.cat([_run(program, own, weights) for own in inputs])
    assert batched.inputs[0].type.shape[0] == 2 * CALLS
    torch.testing.assert_close(_run(batched, joined, weights), wanted, rtol=1e-6, atol=1e-6)


def _of(name: str, *args: object, shape: tuple[int, ...] = (2, 6)) -> Program:
    w = Writer()
    return w.program("Meeting", w.op(name, w.value("%x", *shape), *args))


def _product(rows: tuple[int, ...], matrix: tuple[int, ...]) -> Program:
    w = Writer()
    return w.program("Product", w.op("matmul.default", w.value("%x", *rows), w.value("@weight", *matrix)))


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> Program:
    w = Writer()
    return w.program("Broadcast", w.op("add.Tensor", w.value("%x", *first), w.value("%y", *second)))


@pytest.mark.parametrize(
    "program",
    [
        _of("mean.dim", (0,)),
        _of("softmax.int", 0),
        _of("mean.dim", (1, 0)),
        _of("sum.dim_IntList", ()),
        _of("layer_norm.default", (2, 6)),
        _product((2, 6), (3, 6, 4)),
        _of("cumsum.default", 1),
        _of("flip.default", (0,)),
        _of("select.int", 0, 0),
        _of("unsqueeze.default", 0),
        _of("view.default", (12,)),
        _of("transpose.int", 0, 1),
        _of("expand.default", (1, 3, 6), shape=(1, 6)),
        _broadcast((1, 6), (2, 6)),
        _broadcast((2,), (6, 2)),
        _broadcast((6,), (2, 6)),
    ],
    ids=lambda program: program.ops[0].name + str(program.inputs[0].type),
)
def test_rows_that_meet_are_refused(program):
    with pytest.raises(RowsMeet):
        Batch({}, CALLS).program(program)


def test_a_number_has_no_rows():
    with pytest.raises(RowsMeet, match="a number has no rows"):
        Batch({}, CALLS).program(_of("neg.default", shape=()))
