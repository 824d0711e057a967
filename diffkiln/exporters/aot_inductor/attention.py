"""Attention as a region's engine for a GPU computes it: by the operator of one kernel, chosen when the engine is built.

`scaled_dot_product_attention` chooses at every call, by what it finds on the GPU. Where none is there it would settle
for the slowest kernel and compute part of it while it is being compiled. What it does to its arguments before it calls
a kernel is done here in the same way: torch 2.13, aten/src/ATen/native/transformers/attention.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffkiln.exporters.cuda import cuda_version
from diffkiln.interpreter.aten import Special
from diffkiln.program import SDPA, Op, Program, TensorType, kernel_of
from diffkiln.program.attention import call_problems, device_problem, read_attention
from diffkiln.spec.targets import Target

_USUAL = ("native_flash", "native_efficient")
#: Compute capability: torch's kernels, the fastest first. Torch's own flash attention is FlashAttention-2, written for
#: Ampere; on Hopper and on Blackwell of data centres cuDNN's kernel is much faster, and eager torch prefers it there.
#: Sources: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention;
#: FlashAttention-3 (arXiv 2407.08608), figure 5, forward with 128 channels a head. Not measured here.
ORDERS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (9, 0): ("native_cudnn", *_USUAL),
    (10, 0): ("native_cudnn", *_USUAL),
    (10, 3): ("native_cudnn", *_USUAL),
}

#: Fused kernels read this many channels, or entries of a mask's row, at a time.
_CHANNELS, _MASK = 8, 16

_Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]


def explicit_attention(region: Program, target: Target) -> Mapping[str, Special]:
    """Returns the operators that replace attention in a region that is traced for a GPU, by name."""

    def chosen(op: Op) -> Callable[..., Sequence[Tensor]]:
        attend = _KERNELS[gpu_kernel(op, region.types, target)]
        call = read_attention(op)

        def run(query: Tensor, key: Tensor, value: Tensor, *rest: object, **named: object) -> Sequence[Tensor]:
            mask = rest[0] if rest else named.get("attn_mask")
            assert mask is None or isinstance(mask, Tensor)
            scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
            return (attend(query, key, value, mask, call.causal, scale),)

        return run

    return {SDPA: chosen}


def gpu_kernel(op: Op, types: Mapping[str, TensorType], target: Target) -> str:
    """Returns the kernel of one attention on a GPU: the one it asks for, else the first of `ORDERS` that takes it."""
    if asked := kernel_of(op):
        return asked
    for name in ORDERS.get(target.capability, _USUAL):
        if name == "native_cudnn" and not _cudnn_is_sound(op, types):
            continue
        if not device_problem(name, "cuda", target.capability) and not any(call_problems(name, op, types, "cuda")):
            return name
    return "native_math"


def _cudnn_is_sound(op: Op, types: Mapping[str, TensorType]) -> bool:
    """Returns True if cuDNN gives right results here.

    Before 9.15.1 its results are wrong for some numbers of tokens; torch's builds for CUDA 13 have a later one
    (check_prefer_cudnn_attention). A mask that leaves a query nothing, one key, and fewer heads of keys than of queries
    have not been tried with it.
    """
    if int((cuda_version() or "0").partition(".")[0]) < 13:
        return False
    call = read_attention(op)
    query, key = types[call.query.name].shape, types[call.key.name].shape
    return call.mask is None and len(query) == 4 and query[1] == key[1] and key[2] != 1


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    assert mask is None
    padded = [_padded(tensor, _CHANNELS) for tensor in (query, key, value)]
    out = torch.ops.aten._scaled_dot_product_flash_attention.default(*padded, 0.0, causal, False, scale=scale)[0]
    return out[..., : value.shape[-1]]


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    bias = None if mask is None else _bias(mask, query, key)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return operator(query, key, value, bias, False, 0.0, causal, scale=scale)[0]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    bias = None if mask is None else _bias(mask, query, key)
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return operator(query, key, value, bias, False, 0.0, causal, False, scale=scale)[0]


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    operator = torch.ops.aten._scaled_dot_product_attention_math.default
    grouped = query.dim() > 2 and query.shape[-3] != key.shape[-3]
    bias = None if mask is None else _added(mask, query.dtype)
    return operator(query, key, value, bias, 0.0, causal, None, scale=scale, enable_gqa=grouped)[0]


_KERNELS: Mapping[str, _Attention] = {
    "native_flash": _flash,
    "native_efficient": _efficient,
    "native_cudnn": _cudnn,
    "native_math": _math,
}


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Returns a mask as the number added to every score, [batch, heads, queries, keys], aligned for the kernels."""
    mask = _added(mask, query.dtype)
    keys = mask.shape[-1]
    if keys != 1:
        mask = _padded(mask, _MASK)[..., :keys]
    return mask.expand(*query.shape[:-1], key.shape[-2])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), float("-inf"))


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return functional.pad(tensor, (0, missing)) if missing else tensor
