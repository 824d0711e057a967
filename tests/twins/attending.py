"""Attention that a GPU's kernels would compute: each call is compared with what the region asks for, then computed.

The kernels' conditions are torch 2.13's: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_last_dim_stride),
mem_eff_attention/kernel_forward.h (check_supported: pointers and strides of 16 bytes), attention.cu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.twins.memory import Fault
from tests.twins.written import Attention

_OPERATORS = {
    "native_flash": torch.ops.aten._scaled_dot_product_flash_attention.default,
    "native_cudnn": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "native_efficient": torch.ops.aten._scaled_dot_product_efficient_attention.default,
}

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Attend:
    """The attention of one engine.

    Args:
        expected: the calls, in any order, that one run is to make.
    """

    def __init__(self, expected: Sequence[Attention]) -> None:
        self.left = list(expected)
        self.calls = 0

    def __call__(self, kernel: str, given: Sequence[int | None], causal: bool, scale: float) -> int:
        """Returns the address of the handle of the result.

        Args:
            given: addresses of handles, which are taken: query, key, value, and a mask or nothing.

        Raises:
            Fault: the region asks for no such attention, or the kernel does not take these strides.
        """
        query, key, value, mask = (None if each is None else _tensor(each) for each in given)
        assert query is not None
        assert key is not None
        assert value is not None
        self.calls += 1
        self._expect(Attention(kernel, tuple(query.shape), tuple(key.shape), causal, scale, mask is not None))
        for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
            if tensor is not None:
                _check(f"{kernel}, {name}", tensor)
        attended = scaled_dot_product_attention(
            query.float(), key.float(), value.float(), None if mask is None else mask.float(), 0.0, causal, scale=scale
        )
        return _handle(_laid_out(kernel, query, key, value, mask).copy_(attended))

    def _expect(self, made: Attention) -> None:
        for call in self.left:
            padded = Attention(call.kernel, _padded(call, call.query), _padded(call, call.key), *_rest(call))
            if (padded.kernel, padded.query, padded.key, *_rest(padded)[:1], padded.masked) == (
                (made.kernel, made.query, made.key, made.causal, made.masked)
            ) and abs(padded.scale - made.scale) <= 1e-6 * padded.scale:
                self.left.remove(call)
                return
        raise Fault(f"the region asks for no {made}; left are {self.left}")


def _rest(call: Attention) -> tuple[bool, float, bool]:
    return call.causal, call.scale, call.masked


def _padded(call: Attention, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes that flash attention is given: channels are padded to a multiple of eight."""
    return (*shape[:-1], shape[-1] + -shape[-1] % 8) if call.kernel == "native_flash" else shape


def _check(what: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) not in (0, 1):
        raise Fault(f"{what}: the last stride is {tensor.stride(-1)}, not 1")
    steps = [step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if any(step * tensor.element_size() % 16 for step in steps) or tensor.data_ptr() % 16:
        raise Fault(f"{what}: strides {tensor.stride()} of {tensor.dtype} at {tensor.data_ptr():#x}, not of 16 bytes")


def _laid_out(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Returns an empty tensor with the strides that the GPU's operator gives."""

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    inputs: list[Any] = [meta(query), meta(key), meta(value)]
    if kernel != "native_flash":
        inputs += [None if mask is None else meta(mask), False]
    like = _OPERATORS[kernel](*inputs)[0]
    return torch.empty_strided(like.shape, like.stride(), dtype=query.dtype)


def _tensor(address: int) -> Tensor:
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_new(address, None, None))


def _handle(tensor: Tensor) -> int:
    return _address(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)
