"""torch's own kernels: the one that was chosen runs, or an error names it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffkiln.errors import Incompatible, VerifyError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.attention import by_kernel, kernel_for, only
from diffkiln.program import NATIVE, SDPA, Input, Op, Program, Ref, TensorType

QKV = tuple(torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def switches() -> dict[str, bool]:
    read = (cuda.math_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
    return {name: enabled() for name, enabled in zip(NATIVE, read, strict=True)}


def program(*kernels: str | None) -> Program:
    """Attentions, each of the result of the one before."""
    kind = TensorType("float32", (1, 2, 40, 16))
    inputs = tuple(Input(f"%{name}", kind) for name in "qkv")
    ops, query = [], Ref("%q")
    for index, kernel in enumerate(kernels):
        attrs = {"kernel": kernel} if kernel else {}
        ops.append(Op(SDPA, (query, Ref("%k"), Ref("%v")), (f"%{index}",), attrs=attrs))
        query = Ref(f"%{index}")
    return Program("Block", inputs, tuple(ops), (query,), dict.fromkeys(["%q", "%k", "%v", *_names(ops)], kind))


def _names(ops: list[Op]) -> list[str]:
    return [name for op in ops for name in op.outputs]


@pytest.mark.parametrize("kernel", NATIVE)
def test_only_the_chosen_one_is_switched_on(kernel):
    before = switches()
    with only(kernel):
        assert [name for name, on in switches().items() if on] == [kernel]
    assert switches() == before


def test_switches_are_put_back_after_an_error():
    before = switches()
    with pytest.raises(ZeroDivisionError), only("native_math"):
        raise ZeroDivisionError
    assert switches() == before


def test_threads_do_not_meet_each_others_switches():
    def run(kernel: str) -> bool:
        alone = by_kernel(lambda: [name for name, on in switches().items() if on] == [kernel], kernel, "a test")
        return all(alone() for _ in range(300))

    before = switches()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, NATIVE))
    assert switches() == before


@pytest.mark.parametrize(
    ("kernel", "backend"), [("native_math", SDPBackend.MATH), ("native_flash", SDPBackend.FLASH_ATTENTION)]
)
def test_a_program_runs_the_kernel_that_it_names(kernel, backend):
    with torch.inference_mode(), sdpa_kernel(backend):
        wanted = scaled_dot_product_attention(*QKV)
    with torch.inference_mode():
        (found,) = Interpreter(program(kernel))(QKV)
    assert torch.equal(found, wanted)


def test_the_kernels_differ():
    """Else the tests of this file would tell nothing."""
    with torch.inference_mode():
        assert not torch.equal(Interpreter(program("native_math"))(QKV)[0], Interpreter(program(None))(QKV)[0])


@pytest.mark.parametrize("kernel", ["native_efficient", "native_cudnn"])
def test_a_kernel_that_the_device_has_not_is_an_error_that_names_it(kernel):
    with pytest.raises(Incompatible, match=rf"Block: the attention kernel {kernel} cannot take float32\[1,2,40,16\]"):
        Interpreter(program(kernel))(QKV)


def test_a_shape_that_the_kernel_does_not_take_is_an_error_that_names_it():
    with pytest.raises(Incompatible, match=r"native_flash cannot take .*float32\[3,2,40,16\].* on cpu"):
        Interpreter(program("native_flash"))([QKV[0], QKV[1].expand(3, -1, -1, -1), QKV[2].expand(3, -1, -1, -1)])


def test_other_errors_stay_what_they_are():
    def broken() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        by_kernel(broken, "native_math", "a test")()


def test_lowering_knows_the_kernel_of_a_region():
    before = switches()
    with kernel_for(program("native_math", "native_math")):
        assert not cuda.flash_sdp_enabled()
    with kernel_for(program(None)):
        assert switches() == before
    with pytest.raises(VerifyError, match="several attention kernels: native_flash, native_math"):
        kernel_for(program("native_math", "native_flash")).__enter__()
