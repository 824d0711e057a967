"""Which kernel computes attention on a GPU, and that what is done to its arguments changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffkiln.exporters.aot_inductor.attention import _bias, _flash, _math, explicit_attention, gpu_kernel
from diffkiln.program import SDPA, Op, Program, Ref, TensorType
from diffkiln.spec import TARGETS
from tests.exporters.regions import block, in_type

ADA, TURING, HOPPER, B200 = (TARGETS[f"nvidia-{name}"] for name in ("l4", "t4", "h200", "b200"))
RTX_5090 = TARGETS["nvidia-rtx-5090"]
MASK = ("bool", (1, 1, 16, 16))


def attention(
    dtype: str, mask: bool = False, key_heads: int = 2, kernel: str | None = None, width: int = 64, keys: int = 16
) -> tuple[Op, dict]:
    types = {"%q": TensorType(dtype, (1, 2, 16, width)), "%m": TensorType(*MASK)}
    types |= {name: TensorType(dtype, (1, key_heads, keys, width)) for name in ("%k", "%v")}
    args = tuple(Ref(name) for name in ("%q", "%k", "%v", *(["%m"] if mask else [])))
    return Op(SDPA, args, ("%o",), attrs={"kernel": kernel} if kernel else {}), types


@pytest.mark.parametrize(
    ("given", "target", "kernel"),
    [
        ({"dtype": "bfloat16"}, ADA, "native_flash"),
        ({"dtype": "float16", "key_heads": 1}, ADA, "native_flash"),
        ({"dtype": "bfloat16", "mask": True}, ADA, "native_efficient"),
        ({"dtype": "float32"}, ADA, "native_efficient"),
        ({"dtype": "float16"}, TURING, "native_efficient"),
        ({"dtype": "float32", "key_heads": 1}, ADA, "native_math"),
        ({"dtype": "bfloat16", "kernel": "native_cudnn"}, ADA, "native_cudnn"),
    ],
)
def test_the_fastest_kernel_that_can_take_it(given: dict, target, kernel: str) -> None:
    op, types = attention(**given)
    assert gpu_kernel(op, types, target) == kernel


@pytest.mark.parametrize(
    ("given", "target", "kernel"),
    [
        ({"dtype": "bfloat16"}, HOPPER, "native_cudnn"),
        ({"dtype": "float16", "width": 128}, B200, "native_cudnn"),
        ({"dtype": "bfloat16"}, RTX_5090, "native_flash"),
        ({"dtype": "bfloat16"}, ADA, "native_flash"),
        ({"dtype": "float32"}, HOPPER, "native_efficient"),
        ({"dtype": "bfloat16", "width": 160}, HOPPER, "native_flash"),
        ({"dtype": "bfloat16", "width": 20}, HOPPER, "native_flash"),
        ({"dtype": "bfloat16", "width": 512}, HOPPER, "native_efficient"),
        ({"dtype": "bfloat16", "mask": True}, HOPPER, "native_efficient"),
        ({"dtype": "bfloat16", "key_heads": 1}, HOPPER, "native_flash"),
        ({"dtype": "bfloat16", "keys": 1}, HOPPER, "native_flash"),
        ({"dtype": "bfloat16", "kernel": "native_flash"}, HOPPER, "native_flash"),
    ],
)
def test_hopper_and_blackwell_of_data_centres_take_cudnn_where_it_can(monkeypatch, given, target, kernel) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    op, types = attention(**given)
    assert gpu_kernel(op, types, target) == kernel


@pytest.mark.parametrize("cuda", ["12.9", None])
def test_a_cudnn_that_is_wrong_for_some_numbers_of_tokens_is_not_taken(monkeypatch, cuda) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", "2.12.0")  # whose other build is not known
    op, types = attention("bfloat16")
    assert gpu_kernel(op, types, HOPPER) == "native_flash"


def test_math_equals_torchs_own_attention() -> None:
    query, key, value = torch.randn(3, 1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    for given, named in ((mask, {"attn_mask": mask}), (None, {"is_causal": True})):
        found = _math(query, key, value, given, given is None, 0.25)
        torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, scale=0.25, **named))
    grouped = _math(query, key[:, :2], value[:, :2], None, False, 0.25)
    expected = scaled_dot_product_attention(query, key[:, :2], value[:, :2], scale=0.25, enable_gqa=True)
    torch.testing.assert_close(grouped, expected)


def test_a_mask_becomes_what_is_added_with_rows_on_boundaries() -> None:
    query, key = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8)
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 1, 5)
    bias = _bias(mask, query, key)
    assert bias.shape == (2, 3, 4, 5)
    assert bias[0, 0, 0].tolist() == [0, 0, float("-inf"), 0, float("-inf")]
    assert bias.untyped_storage().nbytes() == 2 * 16 * 4  # rows of five are kept in rows of sixteen


def test_heads_are_padded_to_what_the_kernel_reads_at_a_time() -> None:
    query = torch.empty(1, 2, 8, 20, device="meta", dtype=torch.bfloat16)
    assert _flash(query, query, query, None, False, 0.2).shape == query.shape


@pytest.mark.parametrize("make", [block, lambda: in_type(block(), "bfloat16")])
def test_takes_the_operations_place_in_a_region(make: Callable[[], Program]) -> None:
    region = make()
    (op,) = (op for op in region.ops if op.name == SDPA)
    chosen = explicit_attention(region, ADA)[SDPA](replace(op))
    types = [region.types[ref.name] for ref in op.args if isinstance(ref, Ref)]
    given = [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in types]
    (out,) = chosen(*given)
    assert out.shape == given[0].shape
