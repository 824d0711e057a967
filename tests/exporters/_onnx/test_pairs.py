"""Complex numbers as pairs: every operator of the list against torch, and rotary embeddings as engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffkiln.exporters._onnx.pairs import _DECOMPOSITIONS, paired_arithmetic
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.onnx.check import Onnx
from diffkiln.exporters.tensorrt.check import Tensorrt
from diffkiln.interpreter.aten import Interpreter, in_pairs
from diffkiln.program import Program, Ref
from diffkiln.program.pairs import OPERATORS
from diffkiln.program.sizes import families
from diffkiln.runtime.engines.onnx.engine import OnnxEngine
from diffkiln.runtime.self_test import self_test
from tests.exporters.regions import CPU, RTX_4090, Writer, engine_cache, interpreted

SHAPE = (2, 3, 4)
#: Operators of one complex tensor with the rest of their arguments; the result is complex.
COMPLEX = {
    "unsqueeze.default": (-2,),
    "reshape.default": ((6, 4),),
    "view.default": ((2, -1),),
    "transpose.int": (-1, 0),
    "permute.default": ((2, 0, -2),),
    "slice.Tensor": (-1, 1, 3),
    "select.int": (-1, 2),
    "contiguous.default": (),
    "clone.default": (),
    "conj_physical.default": (),
    "resolve_conj.default": (),
    "mul.Tensor": (2.0,),
}


def drawn(region: Program) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, item.type.dtype) for item in region.inputs]
    shapes = [item.type.shape for item in region.inputs]
    return [torch.randn(s, dtype=d, generator=generator) for s, d in zip(shapes, dtypes, strict=True)]


def one(name: str, *rest: object) -> Program:
    w = Writer()
    x = w.value("%x", *SHAPE, dtype="complex64")
    return w.program("One", w.op("view_as_real.default", w.op(name, x, *rest)))  # type: ignore[arg-type]


def many(operate: Callable[[Writer, Ref, Ref, Ref], Ref]) -> Program:
    """An operation of two complex tensors and a real one."""
    w = Writer()
    x, y = (w.value(name, *SHAPE, dtype="complex64") for name in ("%x", "%y"))
    return w.program("Many", operate(w, x, y, w.value("%r", 3, 1)))


def rotary(tokens: int, dtype: str = "float32", wide: str = "complex64") -> Program:
    """Queries turned by complex embeddings, as Qwen-Image has them."""
    w = Writer()
    x, angles = w.value("%x", 1, tokens, 2, 8, dtype=dtype), w.value("%angles", tokens, 4, dtype=wide)
    numbers = w.op("view_as_complex.default", w.op("reshape.default", x, (1, tokens, 2, 4, 2)))
    turned = w.op("mul.Tensor", numbers, w.op("unsqueeze.default", angles, 1))
    return w.program("Rotary", w.op("reshape.default", w.op("view_as_real.default", turned), (1, tokens, 2, 8)))


def onnx(tokens: int, *members: int, **named: str) -> tuple[Program, Artefact]:
    region = rotary(tokens, **named)
    family = families([rotary(size, **named) for size in (tokens, *members)])[0] if members else None
    return region, Onnx().export(Lowering(region, CPU, family=family), engine_cache())


def check(region: Program) -> None:
    flat = drawn(region)
    paired = Interpreter(region, special=paired_arithmetic(region))(list(map(in_pairs, flat)))
    torch.testing.assert_close(paired, interpreted(region, flat))


@pytest.mark.parametrize("name", COMPLEX)
def test_operators_of_one_tensor(name: str) -> None:
    check(one(name, *COMPLEX[name]))


@pytest.mark.parametrize(
    "operate",
    [
        lambda w, x, y, r: w.op("real.default", w.op("mul.Tensor", x, y)),
        lambda w, x, y, r: w.op("imag.default", w.op("mul.Tensor", x, r)),
        lambda w, x, y, r: w.op("view_as_real.default", w.op("mul.Tensor", r, y)),
        lambda w, x, y, r: w.op("view_as_real.default", w.op("cat.default", (x, y), -1)),
        lambda w, x, y, r: w.op("mul.Tensor", w.op("mul.Tensor", r, r), w.op("real.default", x)),
        lambda w, x, y, r: w.op("imag.default", w.op("expand.default", w.op("unsqueeze.default", x, 0), (5, 2, 3, 4))),
    ],
    ids=["product", "by real", "real by", "joined", "real products", "expanded"],
)
def test_operators_of_several(operate: Callable[[Writer, Ref, Ref, Ref], Ref]) -> None:
    check(many(operate))


def test_a_single_number_of_a_wider_type_widens_nothing() -> None:
    w = Writer()
    x, scale = w.value("%x", *SHAPE, dtype="complex64"), w.value("%scale", dtype="float64")
    check(w.program("Scaled", w.op("view_as_real.default", w.op("mul.Tensor", x, scale))))


def test_the_list_is_what_there_are_forms_of() -> None:
    assert {*_DECOMPOSITIONS, "aten.mul.Tensor"} == OPERATORS


def test_rotary_embeddings_are_an_onnx_model_that_takes_complex_tensors_as_they_lie() -> None:
    region, artefact = onnx(6)
    assert [spec.dtype for spec in artefact.inputs] == ["float32", "complex64"]
    run = OnnxEngine(artefact.directory, artefact.inputs)
    assert self_test(run, region, {}, torch.device("cpu"), "the engine") < 1e-6
    x, angles = drawn(region)
    wanted = interpreted(region, [x, angles.conj()])
    torch.testing.assert_close(run([x, angles.conj()]), wanted)  # torch conjugates when it must
    torch.testing.assert_close(run([x, angles.t().contiguous().t().conj()]), wanted)


def test_double_complex_numbers_stay_double() -> None:
    region, artefact = onnx(6, dtype="float64", wide="complex128")
    flat = drawn(region)
    found = OnnxEngine(artefact.directory, artefact.inputs)(flat)
    torch.testing.assert_close(found, interpreted(region, flat), rtol=1e-14, atol=1e-14)


def test_one_engine_for_a_family_of_sizes() -> None:
    _, artefact = onnx(6, 8, 12)
    run = OnnxEngine(artefact.directory, artefact.inputs)
    for tokens in (6, 8, 12):
        flat = drawn(rotary(tokens))
        torch.testing.assert_close(run(flat), interpreted(rotary(tokens), flat))


def test_tensorrt_takes_them_in_single_precision() -> None:
    artefact = Tensorrt().export(Lowering(rotary(6), RTX_4090), engine_cache())
    assert [spec.dtype for spec in artefact.inputs] == ["float32", "complex64"]
    (reason,) = map(str, Tensorrt().check(rotary(6, dtype="float64", wide="complex128"), RTX_4090, {}))
    assert "found float64, required one of float32" in reason
