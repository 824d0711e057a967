"""Operators that a GPU computes for some shapes only, as functions that compute them for all.

Programs name the operators, so every target shares them. These functions take the operators' place where a program is
replayed on a GPU, and where a region is lowered for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffkiln.interpreter.aten import Special
from diffkiln.program import Op

#: Products of int8 on a GPU: more rows than this, and columns in multiples of that. Source: torch 2.13,
#: aten/src/ATen/native/cuda/Blas.cpp, _int_mm_out_cuda. FLUX's modulations have one row.
_FEW_ROWS, _MULTIPLE = 16, 8
#: Rows that a product of few rows is padded to: one tile of tensor cores.
_ROWS = 32

_pad, _slice = torch.ops.aten.constant_pad_nd.default, torch.ops.aten.slice.Tensor


def int_mm(first: Tensor, second: Tensor) -> Tensor:
    """Returns the product of two int8 matrices of any size, in int32: rows and columns of zeros change nothing."""
    rows, inner, columns = first.shape[0], first.shape[1], second.shape[1]
    few = isinstance(rows, int) and rows <= _FEW_ROWS
    below, beside, behind = _ROWS - rows if few else 0, -inner % _MULTIPLE, -columns % _MULTIPLE
    if below or beside:
        first = _pad(first, (0, beside, 0, below), 0)
    if beside or behind:
        second = _pad(second, (0, behind, 0, beside), 0)
    product = torch.ops.aten._int_mm.default(first, second)
    if below:
        product = _slice(product, 0, 0, rows)
    return _slice(product, 1, 0, columns) if behind else product


def _int_mm(op: Op) -> Callable[..., Sequence[Tensor]]:
    return lambda first, second: [int_mm(first, second)]


_DECOMPOSITIONS: Mapping[str, Special] = {"aten._int_mm.default": _int_mm}


def gpu_decompositions(device: torch.device | str) -> Mapping[str, Special]:
    """Returns what takes the place of operators on a device, by the operator's name; nothing on a CPU."""
    return {} if torch.device(device).type == "cpu" else _DECOMPOSITIONS
