"""What takes the place of operators on their way to ONNX gives what torch gives, also at the edges."""

from __future__ import annotations

import pytest
import torch

from diffkiln.exporters._onnx.decompositions import onnx_decompositions
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import Program, Ref
from diffkiln.runtime.engines.onnx.engine import OnnxEngine
from tests.exporters.regions import CPU, Writer, engine_cache, interpreted, tensors

HEADS = (1, 4, 6, 8)


def attending(query=HEADS, key=HEADS, mask=None, dtype="float32", **named) -> Program:
    w = Writer()
    args = [w.value("%q", *query), w.value("%k", *key), w.value("%v", *key)]
    args += [w.value("%m", *mask, dtype=dtype)] if mask else []
    return w.program("Attention", w.op("scaled_dot_product_attention.default", *args, **named))


def exported(region: Program) -> OnnxEngine:
    artefact = Onnx().export(Lowering(region, CPU), engine_cache())
    return OnnxEngine(artefact.directory, artefact.inputs)


class TestAttention:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"scale": 0.3},
            {"scale": -0.3},
            {"is_causal": True},
            {"key": (1, 4, 9, 8), "is_causal": True},
            {"key": (1, 2, 6, 8), "enable_gqa": True},
            {"query": (2, 6, 8), "key": (2, 9, 8)},
            {"query": (6, 8), "key": (9, 8)},
            {"query": (1, 2, 3, 6, 8), "key": (1, 2, 3, 6, 8)},
        ],
    )
    def test_gives_what_torch_gives(self, given: dict) -> None:
        region = attending(**given)
        flat = tensors(region)
        torch.testing.assert_close(
            Interpreter(region, special=onnx_decompositions(region))(flat), interpreted(region, flat)
        )

    @pytest.mark.parametrize("shape", [(1, 1, 6, 6), (6, 6), (1, 1, 6, 1)])
    @pytest.mark.parametrize("dtype", ["bool", "float32"])
    def test_a_query_that_may_look_at_nothing_gets_zeros(self, shape: tuple[int, ...], dtype: str) -> None:
        region = attending(mask=shape, dtype=dtype)
        mask = torch.ones(shape, dtype=torch.bool).tril()
        mask[..., 2, :] = False
        if dtype == "float32":
            mask = torch.zeros(shape).masked_fill(~mask, float("-inf"))
        flat = [*tensors(region)[:3], mask]
        (wanted,) = interpreted(region, flat)
        assert not wanted[..., 2, :].any()
        torch.testing.assert_close(exported(region)(flat)[0], wanted)

    def test_a_finite_mask_that_leaves_nothing_in_is_added_as_it_is(self) -> None:
        """T5's masks are the lowest number: where all entries have it, all are alike."""
        region = attending(mask=(1, 1, 1, 6))
        flat = [*tensors(region)[:3], torch.full((1, 1, 1, 6), torch.finfo(torch.float32).min)]
        torch.testing.assert_close(exported(region)(flat), interpreted(region, flat))


def test_squeezing_a_dimension_of_more_than_one_element_changes_nothing() -> None:
    w = Writer()
    x = w.value("%x", 1, 4, 1)
    region = w.program("Squeezed", *(w.op("squeeze.dim", x, dim) for dim in (0, 1, -1)))
    flat = tensors(region)
    torch.testing.assert_close(exported(region)(flat), interpreted(region, flat))


def test_truth_is_sorted_and_keeps_its_order_and_its_type() -> None:
    w = Writer()
    found = w.op("gt.Scalar", w.value("%x", 3, 9), 0.0)
    ranks = w.op("argsort.stable", found, stable=True, dim=-1, descending=True)
    region = w.program("Ranked", ranks, w.op("argsort.default", w.op("neg.default", Ref("%x")), 0))
    flat = tensors(region)
    torch.testing.assert_close(exported(region)(flat), interpreted(region, flat))


@pytest.mark.parametrize("rows", [6, 40])
def test_distances_of_few_rows_and_of_many(rows: int) -> None:
    w = Writer()
    region = w.program("Distances", w.op("cdist.default", w.value("%x", rows, 4), w.value("@codes", 16, 4)))
    flat = tensors(region)
    torch.testing.assert_close(exported(region)(flat), interpreted(region, flat), rtol=1e-5, atol=1e-5)


def test_distances_of_another_norm_are_left_to_torch() -> None:
    w = Writer()
    region = w.program("Distances", w.op("cdist.default", w.value("%x", 3, 4), w.value("%y", 5, 4), 1.0))
    flat = tensors(region)
    assert torch.equal(Interpreter(region, special=onnx_decompositions(region))(flat)[0], interpreted(region, flat)[0])


def test_a_value_that_comes_out_twice_is_written_twice() -> None:
    """Text encoders give their last hidden state also as one of all. Outputs are bound by name."""
    w = Writer()
    y = w.op("relu.default", w.value("%x", 4, 8))
    region = w.program("Twice", y, w.op("neg.default", y), Ref(y.name))
    flat = tensors(region)
    run = exported(region)
    for _ in range(2):
        torch.testing.assert_close(run(flat), interpreted(region, flat))
