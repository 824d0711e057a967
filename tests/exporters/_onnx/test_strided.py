"""Views by strides as slices: the same values as torch's own, and the same operators where no slice will do."""

from __future__ import annotations

import pytest
import torch

from diffkiln.exporters._onnx.strided import STRIDED, box_of
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import Program
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.onnx.engine import OnnxEngine
from tests.exporters.regions import CPU, Writer, engine_cache, interpreted, tensors

VIEWS = {
    "every second channel": ((1, 6, 2, 16), (1, 6, 2, 8), (192, 32, 16, 2), 1),
    "the last rows": ((1, 6, 2, 4), (1, 4, 2, 4), (48, 8, 4, 1), 16),
    "all, in another form": ((4, 6), (2, 12), (12, 1), 0),
    "all, transposed": ((4, 6), (6, 4), (1, 6), 0),
    "rows and channels within": ((4, 6, 8), (2, 3, 2), (96, 16, 2), 50),
    "one row of a mask": ((1, 1, 8, 8), (1, 1, 8), (64, 64, 8), 3),
    "one element": ((4, 6), (1, 1), (1, 1), 13),
}


def viewed(base: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Program:
    """What is seen through the view, and the whole with something else in its place."""
    w = Writer()
    x, source = w.value("%x", *base), w.value("%source", *size)
    seen = w.op("as_strided.default", x, size, stride, offset)
    return w.program("Viewed", seen, w.op("as_strided_scatter.default", x, source, size, stride, offset))


def rotated(tokens: int) -> Program:
    """Two writes, as rotary embeddings make them: `out[..., 0::2] = x; out[..., 1::2] = y`."""
    w = Writer()
    x, y = (w.value(name, 1, tokens, 2, 8) for name in ("%x", "%y"))
    view = (1, tokens, 2, 8), (tokens * 32, 32, 16, 2)
    out = w.op("new_zeros.default", x, (1, tokens, 2, 16))
    for source, offset in ((x, 0), (y, 1)):
        out = w.op("as_strided_scatter.default", w.op("contiguous.default", out), source, *view, offset)
    return w.program("Rotated", w.op("as_strided.default", out, (1, tokens, 2, 16), (tokens * 32, 32, 16, 1), 0))


@pytest.mark.parametrize("name", VIEWS)
def test_slices_give_what_the_view_gives(name: str) -> None:
    region = viewed(*VIEWS[name])
    flat = tensors(region)
    for found, wanted in zip(Interpreter(region, special=STRIDED)(flat), interpreted(region, flat), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((3, 4), (0, 1), 0), ((3, 4), (2, 1), 0), ((2, 2), (7, 1), 0), ((3, 4), (6, 1), 4)],
    ids=["repeated", "overlapping", "unequal", "across an edge"],
)
def test_a_view_that_is_no_range_of_a_box_stays_what_it_is(size, stride, offset) -> None:
    assert box_of(24, size, stride, offset) is None
    w = Writer()
    region = w.program("Odd", w.op("as_strided.default", w.value("%x", 24), size, stride, offset))
    flat = tensors(region)
    assert torch.equal(Interpreter(region, special=STRIDED)(flat)[0], interpreted(region, flat)[0])


def test_strides_of_a_base_that_is_not_dense_count_in_the_order_of_its_elements() -> None:
    """They do not count in the storage below it, which may hold other tensors."""
    region = viewed((4, 6), (2, 3), (6, 1), 0)
    flat = [torch.randn(6, 4).t(), torch.randn(2, 3)]
    dense = [tensor.contiguous() for tensor in flat]
    for found, wanted in zip(Interpreter(region, special=STRIDED)(flat), interpreted(region, flat), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(interpreted(region, flat), interpreted(region, dense), strict=True):
        assert torch.equal(found, wanted)


def test_writes_through_views_are_one_onnx_model_for_all_sizes() -> None:
    (family,) = families([rotated(tokens) for tokens in (6, 8, 12)])
    artefact = Onnx().export(Lowering(family.members[0], CPU, family=family), engine_cache())
    run = OnnxEngine(artefact.directory, artefact.inputs)
    for member in family.members:
        flat = tensors(member)
        assert torch.equal(run(flat)[0], torch.stack(flat, -1).flatten(-2))
