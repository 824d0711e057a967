"""An engine serves only if it gives what the replay of its region gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import DType, Input, Op, Program, Ref, TensorType
from diffkiln.runtime.reference import replay_in_float32
from diffkiln.runtime.self_test import Repeated, sample, self_test
from tests.exporters.regions import attending_by_package

HOMES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
KIND = TensorType("float32", (3, 4))
REGION = Program(
    "block",
    (Input("%x", KIND),),
    (Op("aten.mul.Tensor", (Ref("%x"), Ref("@w")), ("%1",)), Op("aten.add.Tensor", (Ref("%1"), Ref("#k")), ("%2",))),
    (Ref("%2"),),
    dict.fromkeys(("%x", "@w", "#k", "%1", "%2"), KIND),
)
CONSTANTS = {"k": torch.ones(3, 4)}


class Right:
    def __init__(self):
        self.checked = 0

    def check(self, flat):
        self.checked += len(flat)

    def __call__(self, flat):
        return Interpreter(REGION)([flat[0]], {"w": flat[1]}, {"k": flat[2]})


class Off(Right):
    def __call__(self, flat):
        return [super().__call__(flat)[0] * 1.01]


class Slightly(Right):
    def __call__(self, flat):
        return [(flat[0].round() + flat[-1]) * 1.005]


class SlightlyOfAll(Right):
    def __call__(self, flat):
        return [super().__call__(flat)[0] * 1.005]


class NotANumber(Right):
    def __call__(self, flat):
        return [super().__call__(flat)[0] * float("nan")]


class OtherType(Right):
    def __call__(self, flat):
        return [super().__call__(flat)[0].double()]


class Picky(Right):
    def check(self, flat):
        raise VerifyError("input 0: shape")


def run(engine):
    return self_test(engine, REGION, CONSTANTS, torch.device("cpu"), "engine e")


def test_a_right_engine_passes_and_its_inputs_are_checked():
    engine = Right()
    assert run(engine) == 0.0
    assert engine.checked == 3


def test_neither_computes_in_tf32():
    """Its rounding is larger than what float32 may differ by, and torch's convolutions take it by default."""
    seen = []

    class Watched(Right):
        def __call__(self, flat):
            seen.append([home.fp32_precision for home in HOMES])
            return super().__call__(flat)

    before = [home.fp32_precision for home in HOMES]
    run(Watched())
    assert seen == [["ieee", "ieee"]]
    assert [home.fp32_precision for home in HOMES] == before


def test_attention_by_a_package_is_part_of_the_replay(monkeypatch):
    region = attending_by_package()
    monkeypatch.setattr("diffkiln.runtime.self_test.packaged", lambda _: lambda q, k, v: [attend(q, k, v)])

    class Engine(Right):
        def __call__(self, flat):
            return [attend(*flat[:3]) * flat[3]]

    assert self_test(Engine(), region, {}, torch.device("cpu"), "engine e") < 1e-6


def test_a_region_that_rounds_may_differ_by_more():
    rounds = replace(REGION, ops=(Op("aten.round.default", (Ref("%x"),), ("%1",)), REGION.ops[1]))
    self_test(Slightly(), rounds, CONSTANTS, torch.device("cpu"), "engine e")
    with pytest.raises(VerifyError, match="more than 1e-04"):
        run(SlightlyOfAll())


def narrow(dtype: str, rows: int = 4096, columns: int = 64) -> Program:
    """A product and a sum in a narrow type, whose result is wide and high."""
    x, weight, out = (TensorType(dtype, shape) for shape in ((rows, columns), (columns, columns), (rows, columns)))
    ops = (
        Op("aten.mm.default", (Ref("%x"), Ref("@w")), ("%0",)),
        Op("aten.mul.Tensor", (Ref("%0"), Ref("%0")), ("%1",)),
        Op("aten.add.Tensor", (Ref("%1"), Ref("%x")), ("%2",)),
        Op("aten.to.dtype", (Ref("%2"), DType(dtype)), ("%3",)),
    )
    types = {"%x": x, "@w": weight, **dict.fromkeys(("%0", "%1", "%2", "%3"), out)}
    return Program("block", (Input("%x", x),), ops, (Ref("%3"),), types)


class Changed:
    """The replay of a region, in the region's own types or in float32, with something done to its result."""

    def __init__(self, region: Program, change, exact: bool = False) -> None:
        self._region, self._change, self._exact = region, change, exact

    def check(self, flat):
        """Takes whatever there is."""

    def __call__(self, flat):
        given = [flat[0]], {"w": flat[1]}, {}
        if self._exact:
            wide = replay_in_float32(self._region, *given, torch.device("cpu"))
            return [self._change(wide[0].to(flat[0].dtype))]
        return [self._change(Interpreter(self._region)(*given)[0])]


def wrong_row(result):
    return torch.cat([result[1:2], result[1:]])


def wrong_column(result):
    return torch.cat([result[:, :-1], result[:, :1]], dim=1)


def rows_off_by_one(result):
    return result.roll(1, 0)


def swapped_rows(result):
    return torch.cat([result[:100], result[101:102], result[100:101], result[102:]])


def scaled(result):
    return result * 1.02


NARROW_KINDS = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@NARROW_KINDS
@pytest.mark.parametrize("exact", [False, True], ids=["as the replay", "as float32, rounded at the end"])
def test_an_engine_in_a_narrow_type_may_round_as_its_replay_does_or_less(dtype, exact):
    region = narrow(dtype)
    found = self_test(Changed(region, lambda result: result, exact), region, {}, torch.device("cpu"), "engine e")
    assert 0 < found < 6e-3


@NARROW_KINDS
@pytest.mark.parametrize("change", [wrong_row, wrong_column, rows_off_by_one, swapped_rows, scaled])
def test_one_row_or_column_from_a_wrong_place_is_found_in_a_narrow_type(dtype, change):
    """Of 4096 rows one that is wrong changes the whole by 2e-2, which a limit for all regions must allow."""
    region = narrow(dtype)
    with pytest.raises(VerifyError, match="differs from its replay"):
        self_test(Changed(region, change), region, {}, torch.device("cpu"), "engine e")


def test_equal_results_pass_where_the_replay_makes_no_error():
    region = replace(narrow("bfloat16"), ops=(Op("aten.neg.default", (Ref("%x"),), ("%3",)),))

    class Negated(Changed):
        def __call__(self, flat):
            return [-flat[0]]

    assert self_test(Negated(region, None), region, {}, torch.device("cpu"), "engine e") == 0.0


def test_a_replay_in_float32_keeps_what_is_stored_in_fewer_bits():
    kind, float8, int8 = (
        TensorType("bfloat16", (4, 16)),
        TensorType("float8_e4m3fn", (4, 16)),
        TensorType("int8", (4, 16)),
    )
    ops = (
        Op("aten.to.dtype", (Ref("%x"), DType("float8_e4m3fn")), ("%0",)),
        Op("aten.view.dtype", (Ref("%0"), DType("int8")), ("%1",)),
        Op("aten.to.dtype", (Ref("%1"), DType("bfloat16")), ("%2",)),
    )
    types = {"%x": kind, "%0": float8, "%1": int8, "%2": kind}
    region = Program("block", (Input("%x", kind),), ops, (Ref("%2"),), types)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    (found,) = replay_in_float32(region, [x], {}, {}, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert torch.equal(found, x.to(torch.float8_e4m3fn).view(torch.int8).float())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Off(), "differs from its replay by 1"),
        (NotANumber(), "not finite"),
        (OtherType(), "float64"),
        (Picky(), "shape"),
    ],
    ids=["off", "nan", "dtype", "inputs"],
)
def test_a_wrong_engine_is_named_with_what_is_wrong(engine, message):
    with pytest.raises(VerifyError, match=message):
        run(engine)


def test_large_tensors_repeat_values_and_no_two_rows_are_alike():
    normal = Repeated(torch.device("cpu"))
    small, large = sample(TensorType("float32", (64,)), normal), sample(TensorType("float32", (1200, 1024)), normal)
    assert small.std() == pytest.approx(1, abs=0.3)
    assert large.std() == pytest.approx(1 / 32, rel=0.01)
    assert len(torch.unique(large, dim=0)) == 1200
    assert not torch.equal(small, sample(TensorType("float32", (64,)), normal))
    again = Repeated(torch.device("cpu"))
    assert torch.equal(small, sample(TensorType("float32", (64,)), again))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "int8", "uint8", "int64", "bool", "complex64", "complex128"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5, 2)])
def test_every_type_and_shape_has_values(dtype, shape):
    values = sample(TensorType(dtype, shape), Repeated(torch.device("cpu")))
    assert (values.dtype, values.shape) == (getattr(torch, dtype), shape)
    if dtype == "bool":
        assert values.all()
    elif "int" in dtype and values.numel() > 1:
        assert set(values.flatten().tolist()) == {0, 1}
