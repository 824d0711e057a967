"""What the table of kernels says of devices and of the attentions of a program."""

from __future__ import annotations

import pytest

from diffkiln.errors import VerifyError
from diffkiln.program import (
    ATTENTION,
    KERNELS,
    NATIVE,
    PACKAGED,
    SDPA,
    Input,
    Op,
    Program,
    Ref,
    TensorType,
    module_from_json,
    module_to_json,
    read_attention,
    verify,
)
from diffkiln.program.attention import Attention, call_problems, device_problem, install_line, kernel_of
from diffkiln.program.ir import Module

Q, K, V, MASK = map(Ref, ("%q", "%k", "%v", "%mask"))


def types(
    heads: int = 4, keys: int = 16, key_heads: int = 4, width: int = 64, dtype: str = "bfloat16", batch: int = 2
) -> dict[str, TensorType]:
    other = TensorType(dtype, (2, key_heads, keys, width))
    shapes = {"%q": TensorType(dtype, (batch, heads, 16, width)), "%k": other, "%v": other}
    return shapes | {"%mask": TensorType(dtype, (2, 1, 16, keys)), "%0": shapes["%q"]}


def program(op: Op) -> Program:
    kinds = types()
    inputs = tuple(Input(name, kinds[name]) for name in ("%q", "%k", "%v"))
    return Program("Block", inputs, (op,), (Ref("%0"),), {name: kinds[name] for name in ("%q", "%k", "%v", "%0")})


def chosen(**changed) -> Op:
    attrs = {"kernel": "flash_2", "causal": False, "scale": None} | changed
    return Op(ATTENTION, (Q, K, V), ("%0",), attrs=attrs)


@pytest.mark.parametrize(
    ("name", "device", "capability", "reason"),
    [
        ("native_math", "cpu", (0, 0), ""),
        ("native_flash", "cpu", (0, 0), ""),
        ("native_efficient", "cpu", (0, 0), "native_efficient is for CUDA GPUs"),
        ("native_efficient", "cuda", (7, 5), ""),
        ("native_cudnn", "cuda", (7, 5), "native_cudnn needs SM 8.0 or later, not 7.5"),
        ("flash_2", "cuda", (12, 0), ""),
        ("flash_3", "cuda", (8, 9), "flash_3 is for SM 9.0, not 8.9"),
        ("flash_3", "cuda", (9, 0), ""),
        ("flash_4", "cuda", (8, 9), "flash_4 needs SM 9.0 or later, not 8.9"),
        ("flash_4", "cuda", (10, 0), ""),
        ("sage", "cuda", (10, 0), "sage is for SM 8.0, 8.6, 8.9, 9.0, 12.0, not 10.0"),
        ("sage", "cuda", (12, 0), ""),
        ("xformers", "cpu", (0, 0), "xformers is for CUDA GPUs"),
    ],
)
def test_devices_that_a_kernel_is_for(name, device, capability, reason):
    assert device_problem(name, device, capability) == reason


@pytest.mark.parametrize(
    ("name", "changed", "op", "reason"),
    [
        ("flash_2", {"dtype": "float32"}, {}, "float32, and it takes float16 and bfloat16"),
        ("xformers", {"dtype": "float32"}, {}, ""),
        ("native_flash", {}, {"attn_mask": MASK}, "a mask, and it takes none"),
        ("native_efficient", {}, {"attn_mask": MASK}, ""),
        ("sage", {"width": 256}, {}, "256 channels a head, and it takes up to 128"),
        ("flash_2", {"width": 256}, {}, ""),
        ("xformers", {"key_heads": 2}, {"enable_gqa": True}, "4 heads of queries on 2 of keys, and it takes as many"),
        ("flash_2", {"key_heads": 2}, {"enable_gqa": True}, ""),
        (
            "flash_3",
            {"keys": 8},
            {"is_causal": True},
            "of 16 queries on 8 keys, and it takes square ones",
        ),
        ("flash_3", {"keys": 8}, {}, ""),
        ("xformers", {"keys": 8}, {"is_causal": True}, ""),
        ("native_cudnn", {"batch": 1}, {}, "and it takes four dimensions and one batch"),
        ("native_math", {"batch": 1, "dtype": "float64"}, {"attn_mask": MASK, "is_causal": True}, ""),
    ],
)
def test_attentions_that_a_kernel_can_compute(name, changed, op, reason):
    found = list(call_problems(name, Op(SDPA, (Q, K, V), ("%0",), op), types(**changed), "cuda"))
    assert len(found) == bool(reason)
    assert all(text.endswith(reason) for text in found)


def test_torchs_kernels_for_cpus_take_any_type_and_masks():
    for name in ("native_math", "native_flash"):
        op = Op(SDPA, (Q, K, V, MASK), ("%0",))
        assert not list(call_problems(name, op, types(dtype="float32", width=512), "cpu"))


def test_arguments_are_read_wherever_they_stand():
    call = Op(SDPA, (Q, K, V, MASK, 0.0, True), ("%0",), {"scale": 0.5})
    assert read_attention(call) == Attention(Q, K, V, MASK, True, 0.5)
    call = Op(SDPA, (Q, K, V), ("%0",), {"attn_mask": None, "is_causal": True})
    assert read_attention(call) == Attention(Q, K, V, None, True, None)
    assert read_attention(chosen(causal=True, scale=0.25)) == Attention(Q, K, V, None, True, 0.25)


def test_an_operation_says_its_kernel():
    assert kernel_of(Op(SDPA, (Q, K, V), ("%0",))) is None
    assert kernel_of(Op(SDPA, (Q, K, V), ("%0",), attrs={"kernel": "native_math"})) == "native_math"
    assert kernel_of(chosen()) == "flash_2"


@pytest.mark.parametrize("op", [chosen(scale=0.5), Op(SDPA, (Q, K, V), ("%0",), attrs={"kernel": "native_math"})])
def test_kernels_survive_json(op):
    module = Module("transformer", {}, {"Block": program(op)})
    again = module_from_json(module_to_json(module))
    assert again == module
    verify(again.regions["Block"])


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Op(SDPA, (Q, K, V), ("%0",), attrs={"kernel": "flash_2"}), "torch has no attention kernel 'flash_2'"),
        (Op(SDPA, (Q, K, V), ("%0",), attrs={"kernel": ["native_math"]}), "torch has no attention kernel"),
        (Op(SDPA, (Q, K, V), ("%0",), attrs={"kernel": "native_math", "x": 1}), "an operator has no attributes"),
        (Op("aten.neg.default", (Q,), ("%0",), attrs={"kernel": "native_math"}), "an operator has no attributes"),
        (chosen(kernel="native_math"), r"lacks a proper \['kernel'\]"),
        (chosen(kernel=["flash_2"]), r"lacks a proper \['kernel'\]"),
        (chosen(causal=1), r"lacks a proper \['causal'\]"),
        (chosen(scale="1"), r"lacks a proper \['scale'\]"),
        (Op(ATTENTION, (Q, K), ("%0",), attrs=chosen().attrs), "takes 3 values and gives 1, here 2 and 1"),
        (Op(ATTENTION, (Q, K, 1.0), ("%0",), attrs=chosen().attrs), "no literals"),
    ],
)
def test_kernels_that_are_none_are_refused(op, reason):
    with pytest.raises(VerifyError, match=reason):
        verify(program(op))


def test_every_kernel_is_torchs_or_a_packages_that_can_be_installed():
    assert {*NATIVE, *PACKAGED} == set(KERNELS)
    for name in PACKAGED:
        assert KERNELS[name].versions
        assert install_line(KERNELS[name].package).startswith("pip install ")
    assert install_line("ftfy") == "pip install ftfy"
