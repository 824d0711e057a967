"""Halves of a doubled batch: its parts where it was put together, slices where it was not."""

from __future__ import annotations

import torch

from diffkiln.passes.guiding import HalfBatches
from diffkiln.passes.guiding.half_batches import without_chunks
from diffkiln.program import Builder, Input, Op, Program, Ref, TensorType
from diffkiln.record.constants import Constants

ONE, TWO = TensorType("float32", (1, 4)), TensorType("float32", (2, 4))


def call(*ops: Op, **constants: torch.Tensor) -> tuple[HalfBatches, Builder, Constants]:
    kept = Constants()
    inputs = (Input("%a", ONE), Input("%b", ONE), Input("%whole", TWO))
    types = {item.name: item.type for item in inputs} | {name: TWO for op in ops for name in op.outputs}
    for name, tensor in constants.items():
        kept.tensors[name] = tensor
        types[f"#{name}"] = TensorType("float32", tuple(tensor.shape))
    edit = Builder(Program("call", inputs, ops, (), types))
    return HalfBatches(edit, kept), edit, kept


def written(edit: Builder) -> list[Op]:
    """What was written at the end of a call."""
    return list(edit.build().ops[len(edit.program.ops) :])


def cat(*names: str, out: str = "%both") -> Op:
    return Op("aten.cat.default", (tuple(map(Ref, names)),), (out,))


def test_a_batch_that_was_put_together_is_taken_apart():
    halves, edit, _ = call(cat("%a", "%b"))
    assert [halves.half(Ref("%both"), which, 1) for which in (0, 1)] == [Ref("%a"), Ref("%b")]
    assert written(edit) == []


def test_what_is_done_to_every_row_is_done_once_to_rows_that_are_the_same():
    halves, edit, _ = call(
        cat("%a", "%a"), Op("aten.div.Tensor", (Ref("%both"), Ref("#s")), ("%scaled",)), s=torch.ones(())
    )
    assert halves.half(Ref("%scaled"), 0, 2) == halves.half(Ref("%scaled"), 1, 2) == Ref("%scaled.half.0")
    assert written(edit) == [Op("aten.div.Tensor", (Ref("%a"), Ref("#s")), ("%scaled.half.0",))]
    assert edit.type_of(Ref("%scaled.half.0")) == ONE


def test_what_mixes_rows_is_sliced():
    halves, edit, _ = call(cat("%a", "%b"), Op("aten.flip.default", (Ref("%both"), (0,)), ("%turned",)))
    assert halves.half(Ref("%turned"), 1, 2) == Ref("%turned.half.1")
    assert written(edit) == [Op("aten.slice.Tensor", (Ref("%turned"), 0, 1, 2), ("%turned.half.1",))]


def test_a_concatenation_along_another_dimension_is_sliced():
    halves, edit, _ = call(Op("aten.cat.default", ((Ref("%whole"), Ref("%whole")), 1), ("%wide",)))
    halves.half(Ref("%wide"), 0, 1)
    assert [op.name for op in written(edit)] == ["aten.slice.Tensor"]


def test_halves_of_constants_are_constants():
    halves, _, kept = call(c=torch.tensor([[1.0], [2.0]]))
    first, second = (halves.half(Ref("#c"), which, 0).bare for which in (0, 1))
    assert (kept.tensors[first].item(), kept.tensors[second].item()) == (1.0, 2.0)


def test_what_would_be_cut_in_two_again_is_not():
    _, edit, _ = call(
        Op("aten.chunk.default", (Ref("%whole"), 2), ("%p", "%q")),
        Op("aten.sub.Tensor", (Ref("%q"), Ref("%p")), ("%d",)),
    )
    without_chunks(edit, {"%whole": (Ref("%a"), Ref("%b"))})
    (left,) = edit.build().ops
    assert left.args == (Ref("%b"), Ref("%a"))
