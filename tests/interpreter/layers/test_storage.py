"""Forms by themselves: what `parts` promises is what `restore` takes, and it gives the weight back."""

import pytest
import torch

from diffkiln.interpreter.layers import STORAGE_FORMATS, Cast, FourBit, Int4, Int8, LowRank, Sparse24, store
from diffkiln.passes.model.sparsify import compressed

SHAPE = (8, 64)


def blank(form, shape, dtype):
    return {part: torch.zeros(size, dtype=kind) for part, (size, kind) in form.parts(shape, dtype).items()}


FORMS = (
    Cast(), Int8(), Int4(16), FourBit(), FourBit(nested=True), Sparse24(), LowRank("int4", {"group_size": 16}, 2),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_restores_its_own_parts_in_shape_and_type(form, dtype):
    weight = form.restore(blank(form, SHAPE, dtype), SHAPE, dtype)
    assert (tuple(weight.shape), weight.dtype) == (SHAPE, dtype)
    assert STORAGE_FORMATS[form.name] is type(form)


def test_int8_is_data_times_the_scale_of_its_row():
    parts = {"data": torch.tensor([[1, -2], [127, 0]], dtype=torch.int8), "scale": torch.tensor([[0.5], [2.0]])}
    assert Int8().restore(parts, (2, 2), torch.float32).tolist() == [[0.5, -1.0], [254.0, 0.0]]


def test_int4_has_its_even_column_in_the_low_half():
    parts = {"data": torch.tensor([[0x98]], dtype=torch.uint8), "scale": torch.tensor([[3.0]])}
    assert Int4(2).restore(parts, (1, 2), torch.float32).tolist() == [[0.0, 3.0]]


def test_four_bit_has_its_first_value_in_the_high_half_and_blocks_that_need_not_be_full():
    table = torch.arange(16, dtype=torch.float32)
    parts = {"data": torch.tensor([0x12, 0x30], dtype=torch.uint8), "table": table, "absmax": torch.tensor([2.0])}
    assert FourBit().restore(parts, (1, 3), torch.float32).tolist() == [[2.0, 4.0, 6.0]]


def test_sparse_keeps_the_two_largest_of_four_where_they_stood():
    weight = torch.tensor([[1.0, -9.0, 0.0, 3.0, 4.0, 4.5, -5.0, 0.1]])
    parts = {name.removeprefix("weight_"): part for name, part in compressed(weight).items()}
    kept = [[0.0, -9.0, 0.0, 3.0, 0.0, 4.5, -5.0, 0.0]]
    assert Sparse24().restore(parts, (1, 8), torch.float32).tolist() == kept


def test_parts_of_another_shape_are_refused_by_name():
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"weight_scale is .*\(4,\), int8 stores .*\(4, 1\)"):
        store(layer, Int8(), {"weight_data": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": torch.zeros(4)})


def test_low_rank_adds_the_product_of_its_factors_to_another_form():
    form = LowRank("int8", {}, 1)
    parts = {"data": torch.tensor([[1, -2]], dtype=torch.int8), "scale": torch.tensor([[0.5]])}
    parts |= {"up": torch.tensor([[2.0]]).half(), "down": torch.tensor([[1.0, 0.25]]).half()}
    assert form.restore(parts, (1, 2), torch.float32).tolist() == [[2.5, -0.5]]
    assert form.options() == {"form": "int8", "settings": {}, "rank": 1}
    assert LowRank(**form.options()) == form
