"""The arithmetic of operations against torch's own counter, and the time of phases against what they are made of."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffkiln.program.ir import Op, Ref, TensorType
from diffkiln.program.work import Ceilings, Phase, Work, summed, work_of


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def counted(name: str, *args: object) -> tuple[Work, int]:
    """Returns the work of an operation as it is counted here, and its arithmetic as torch counts it."""
    packet, overload = name.removeprefix("aten.").split(".")
    with FlopCounterMode(display=False) as counter:
        result = getattr(getattr(torch.ops.aten, packet), overload)(*args)
    types = {"out": TensorType(str(result.dtype).removeprefix("torch."), tuple(result.shape))}
    given = []
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            types[f"a{index}"] = TensorType(str(value.dtype).removeprefix("torch."), tuple(value.shape))
            given.append(Ref(f"a{index}"))
        else:
            given.append(tuple(value) if isinstance(value, list) else value)
    return work_of(Op(name, tuple(given), ("out",)), types), counter.get_total_flops()


OPERATIONS = [
    ("aten.linear.default", tensor(2, 5, 8), tensor(6, 8), tensor(6)),
    ("aten.mm.default", tensor(5, 8), tensor(8, 6)),
    ("aten.addmm.default", tensor(6), tensor(5, 8), tensor(8, 6)),
    ("aten.bmm.default", tensor(3, 5, 8), tensor(3, 8, 6)),
    ("aten.baddbmm.default", tensor(3, 5, 6), tensor(3, 5, 8), tensor(3, 8, 6)),
    ("aten.conv2d.default", tensor(2, 4, 8, 8), tensor(6, 4, 3, 3), tensor(6), [1, 1], [1, 1]),
    ("aten.conv2d.default", tensor(2, 4, 8, 8), tensor(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], 2),
    ("aten.convolution.default", tensor(1, 4, 5, 5), tensor(4, 6, 3, 3), None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
    ("aten.scaled_dot_product_attention.default", tensor(2, 3, 5, 8), tensor(2, 3, 7, 8), tensor(2, 3, 7, 8)),
]


@pytest.mark.parametrize("case", OPERATIONS, ids=lambda case: case[0])
def test_arithmetic_is_counted_as_torch_counts_it(case: tuple) -> None:
    work, wanted = counted(*case)
    if not wanted:  # the counter sees no attention that a CPU's own kernel computes
        wanted = 2 * 2 * 2 * 3 * 5 * 7 * 8
    assert work.flops == {32: wanted}


def test_bytes_are_those_of_operands_and_result() -> None:
    work, _ = counted("aten.linear.default", tensor(5, 8), tensor(6, 8))
    assert work.nbytes == 4 * (5 * 8 + 6 * 8 + 5 * 6)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32), (torch.float64, 32)]
)
def test_products_are_told_apart_by_the_width_of_their_operands(dtype: torch.dtype, bits: int) -> None:
    work, _ = counted("aten.mm.default", tensor(4, 4, dtype=dtype), tensor(4, 4, dtype=dtype))
    assert set(work.flops) == {bits}


def test_what_is_no_product_is_no_work() -> None:
    assert counted("aten.add.Tensor", tensor(4), tensor(4))[0] == Work()


class TestTime:
    WORK = Work({16: 1_000, 32: 100}, 400)

    def test_the_slower_of_arithmetic_and_memory_counts(self) -> None:
        assert Ceilings({16: 1_000, 32: 100}, 1_000).seconds(self.WORK) == 2
        assert Ceilings({16: 1_000, 32: 100}, 100).seconds(self.WORK) == 4

    def test_what_is_not_known_takes_no_time(self) -> None:
        assert Ceilings({16: 1_000}).seconds(self.WORK) == 1
        assert Ceilings().seconds(self.WORK) == 0
        assert (Ceilings().known, Ceilings(link=1.0).known) == (False, True)

    def test_weights_come_beside_what_is_computed_or_before_it(self) -> None:
        device = Ceilings({16: 1_000}, link=10)
        assert Phase("denoise", (self.WORK,), 50, True, 1).seconds(device) == 5
        assert Phase("denoise", (self.WORK,), 50, False, 1).seconds(device) == 6
        assert Phase("denoise", (self.WORK, self.WORK), 5, True, 1).seconds(device) == 2

    def test_a_sum(self) -> None:
        assert summed([self.WORK, Work({8: 5}, 1), self.WORK]) == Work({16: 2_000, 32: 200, 8: 5}, 801)
