"""Tensors against tensors."""

from __future__ import annotations

import math

import torch

#: How much of its largest value a float32 result may differ by where a length is fixed: sums have another order.
ROUNDING = 1e-5


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns True if type, shape and every value are equal; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def close(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Returns True if type and shape are equal, and all values within rounding of the largest. NaN is never close."""
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    if not want.numel():
        return True
    if not want.is_floating_point():
        return torch.equal(want, got)
    allowed = max(ROUNDING, 4 * torch.finfo(want.dtype).eps) * float(want.abs().max())
    gap = float((want.double() - got.double()).abs().max())
    return math.isfinite(gap) and gap <= allowed


def difference(want: torch.Tensor, got: torch.Tensor) -> str:
    """Returns how two tensors differ, for a message."""
    if want.dtype != got.dtype or want.shape != got.shape:
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    gap = (want.double() - got.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} values differ, by up to {float(gap.max()):.3e}"
