"""What torch's exporter to ONNX translates wrongly or not at all, in operators that it translates well.

They take the operators' place while a region is traced, so TensorRT gets them, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffkiln.exporters._onnx.pairs import paired_arithmetic
from diffkiln.exporters._onnx.strided import STRIDED
from diffkiln.interpreter.aten import Special, overload
from diffkiln.program import SDPA, Op, Program
from diffkiln.program.attention import read_attention


def onnx_decompositions(region: Program) -> Mapping[str, Special]:
    """Returns the replacements, by name, for operators in a region that becomes ONNX."""
    return {**paired_arithmetic(region), **STRIDED, **_DECOMPOSITIONS}


def _attention(op: Op) -> Callable[..., Sequence[Tensor]]:
    """Returns attention as matrix products, for any number of dimensions.

    torch's own translation takes four dimensions, and lets a query that may look at nothing look at everything alike:
    its masks are the lowest number, not minus infinity. In torch such a query gets zeros.
    """
    call = read_attention(op)

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: object, **named: object) -> Sequence[Tensor]:
        mask = rest[0] if rest else named.get("attn_mask")
        assert mask is None or isinstance(mask, Tensor)
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        root = abs(scale) ** 0.5  # half of it on either side keeps products small
        if query.dim() > 2 and query.shape[-3] != key.shape[-3]:
            key, value = _repeated(key, query.shape[-3]), _repeated(value, query.shape[-3])
        scores = (query * math.copysign(root, scale)) @ (key.transpose(-2, -1) * root)
        lowest = torch.finfo(query.dtype).min
        if call.causal:
            scores = scores + scores.new_full(scores.shape[-2:], lowest).triu(1)
        if mask is None:
            return (scores.softmax(-1) @ value,)
        # The lowest number and not infinity, of which softmax would make no number at all.
        added = mask if mask.dtype != torch.bool else torch.full_like(mask, lowest, dtype=query.dtype) * ~mask
        blind = added.amax(-1, keepdim=True) == (lowest if mask.dtype == torch.bool else float("-inf"))
        return (((scores + added).softmax(-1) @ value).masked_fill(blind, 0.0),)

    return run


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """Repeats each head of keys or values for the heads of queries that share it."""
    times = heads // tensor.shape[-3]
    apart = tensor.unsqueeze(-3)
    return apart.expand(*apart.shape[:-3], times, *apart.shape[-2:]).flatten(-4, -3)


def _squeezed(op: Op) -> Callable[..., Sequence[Tensor]]:
    """Returns a squeeze that leaves dimensions of several elements alone, as torch's does; ONNX's refuses them."""
    return lambda tensor, dim: (tensor.squeeze(dim) if tensor.shape[dim] == 1 else tensor,)


def _ranked(op: Op) -> Callable[..., Sequence[Tensor]]:
    """Returns a sort that also takes booleans, as one and zero; ONNX sorts only numbers. It is always stable."""
    rank = overload(f"{op.name.rpartition('.')[0]}.default")

    def run(tensor: Tensor, *rest: object, stable: bool | None = None, **named: object) -> Sequence[Tensor]:
        found = rank(tensor.to(torch.int32) if tensor.dtype == torch.bool else tensor, *rest, **named)
        return (found,) if isinstance(found, Tensor) else (found[0].to(tensor.dtype), found[1])

    return run


def _distances(op: Op) -> Callable[..., Sequence[Tensor]]:
    """Returns Euclidean distances of all pairs of rows, by products if there are many, as torch chooses.

    Source: torch 2.13, aten/src/ATen/native/Distance.cpp, `cdist_impl`.
    """

    def run(a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Sequence[Tensor]:
        if p != 2.0:
            return (overload(op.name)(a, b, p, mode),)
        if mode == 2 or (mode != 1 and a.shape[-2] <= _FEW_ROWS and b.shape[-2] <= _FEW_ROWS):
            return ((a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt(),)
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
        return ((squares - 2 * a @ b.transpose(-2, -1)).clamp_min(0).sqrt(),)

    return run


#: Rows that torch compares one by one.
_FEW_ROWS = 25

_DECOMPOSITIONS: Mapping[str, Special] = {
    SDPA: _attention,
    "aten.squeeze.dim": _squeezed,
    "aten.cdist.default": _distances,
    **dict.fromkeys(("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable"), _ranked),
}
