"""Kernels of packages: stand-ins that compute with plain torch are given what the packages take."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffkiln.errors import Incompatible, MissingDependency
from diffkiln.program import ATTENTION, KERNELS, PACKAGED, SDPA, Module, Op, Program, Ref
from diffkiln.runtime import attention
from diffkiln.runtime.attention import check_kernels, kernels_of, packaged

QUERY, KEY, VALUE = (
    torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(tokens)) for tokens in (7, 10, 10)
)


def tokens_first(query, key, value, causal, scale):
    """[batch, tokens, heads, channels] in and out, as most packages have it."""
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*turned, is_causal=causal, scale=scale).transpose(1, 2)


def flash(q, k, v, softmax_scale=None, causal=False):
    return tokens_first(q, k, v, causal, softmax_scale)


def flash_with_sums(q, k, v, softmax_scale=None, causal=False):
    return flash(q, k, v, softmax_scale, causal), torch.zeros(())


def sage(q, k, v, tensor_layout, is_causal, sm_scale):
    assert tensor_layout == "HND"
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)


class LowerTriangularMask:
    pass


def xformers(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    return tokens_first(query, key, value, attn_bias is not None, scale)


#: Kernel: the modules that its package has, with what it calls.
STAND_INS = {
    "flash_2": {"flash_attn": {"flash_attn_func": flash}},
    "flash_3": {"flash_attn_interface": {"flash_attn_func": flash_with_sums}},
    "flash_4": {"flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_with_sums}},
    "sage": {"sageattention": {"sageattn": sage}},
    "xformers": {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": xformers, "LowerTriangularMask": LowerTriangularMask},
    },
}


def pretend(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Have the kernel's package importable."""
    for name, functions in STAND_INS[kernel].items():
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def chosen(kernel: str, causal: bool = False, scale: float | None = None) -> Op:
    attrs = {"kernel": kernel, "causal": causal, "scale": scale}
    return Op(ATTENTION, (Ref("%q"), Ref("%k"), Ref("%v")), ("%0",), attrs=attrs)


def test_every_kernel_of_a_package_has_a_stand_in():
    assert set(STAND_INS) == set(PACKAGED) == set(attention._MODULES)


@pytest.mark.parametrize("scale", [None, 0.125])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", PACKAGED)
def test_layout_scale_and_causal_mask_are_handed_over(kernel, causal, scale, monkeypatch):
    pretend(monkeypatch, kernel)
    (found,) = packaged(chosen(kernel, causal, scale))(QUERY, KEY, VALUE)
    wanted = scaled_dot_product_attention(QUERY, KEY, VALUE, is_causal=causal, scale=scale)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", PACKAGED)
def test_channels_lie_side_by_side(kernel, monkeypatch):
    seen = []
    pretend(monkeypatch, kernel)
    place = next(name for name, functions in STAND_INS[kernel].items() if functions)
    function = next(name for name, item in STAND_INS[kernel][place].items() if not isinstance(item, type))
    real = STAND_INS[kernel][place][function]

    def looking(*args, **kwargs):
        seen.extend(arg.stride(-1) for arg in args)
        return real(*args, **kwargs)

    setattr(sys.modules[place], function, looking)
    strided = [tensor.mT.contiguous().mT for tensor in (QUERY, KEY, VALUE)]
    assert strided[0].stride(-1) != 1
    packaged(chosen(kernel))(*strided)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("kernel", PACKAGED)
def test_a_package_that_is_not_there_is_named_with_its_install_line(kernel, monkeypatch):
    monkeypatch.setitem(sys.modules, attention._MODULES[kernel][0], None)
    with pytest.raises(MissingDependency) as caught:
        packaged(chosen(kernel))
    assert KERNELS[kernel].package in str(caught.value)
    assert KERNELS[kernel].install in str(caught.value)


def test_what_a_package_refuses_is_an_error_that_names_the_kernel(monkeypatch):
    def refusing(*_, **__):
        raise AssertionError("no such width")

    pretend(monkeypatch, "flash_2")
    sys.modules["flash_attn"].flash_attn_func = refusing
    with pytest.raises(Incompatible, match=r"flash_2 of flash-attn failed for \[2, 3, 7, 16\].*no such width"):
        packaged(chosen("flash_2"))(QUERY, KEY, VALUE)


def test_memory_that_runs_out_is_not_blamed_on_the_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    pretend(monkeypatch, "flash_2")
    sys.modules["flash_attn"].flash_attn_func = full
    with pytest.raises(torch.OutOfMemoryError):
        packaged(chosen("flash_2"))(QUERY, KEY, VALUE)


def test_a_device_that_a_kernel_is_not_for_is_refused_for_every_component():
    asked = {"unet": ["native_cudnn"], "vae": ["native_math"], "transformer": ["sage"]}
    with pytest.raises(Incompatible) as caught:
        check_kernels(asked, torch.device("cpu"))
    assert [problem.where for problem in caught.value.problems] == ["unet", "transformer"]
    assert "native_cudnn is for CUDA GPUs" in str(caught.value)


def test_a_gpu_that_is_not_there_or_too_old_is_refused(monkeypatch):
    place = torch.device("cuda")
    monkeypatch.setattr(attention.torch, "cuda", SimpleNamespace(is_available=lambda: False))
    check_kernels({"vae": []}, place)
    with pytest.raises(Incompatible, match="there is no CUDA GPU"):
        check_kernels({"vae": ["native_math"]}, place)
    found = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda _: (8, 9))
    monkeypatch.setattr(attention.torch, "cuda", found)
    check_kernels({"transformer": ["flash_2"]}, place)
    with pytest.raises(Incompatible, match=r"transformer: flash_3 is for SM 9\.0, not 8\.9"):
        check_kernels({"transformer": ["flash_3"]}, place)


def test_kernels_of_programs_and_regions():
    plain = Op(SDPA, (Ref("%q"), Ref("%k"), Ref("%v")), ("%0",), attrs={"kernel": "native_math"})
    parts = {name: Program(name, (), (op,), (), {}) for name, op in (("whole", plain), ("Block", chosen("sage")))}
    module = Module("transformer", {"whole": parts["whole"]}, {"Block": parts["Block"]})
    assert kernels_of({"transformer": module}) == {"transformer": ["native_math", "sage"]}
