"""Products in float8 with a scale for each row, on a CPU: torch 2.11 has them for one scale of the whole only.

Bundles for GPUs are verified on the builder's CPU, which must therefore multiply as their GPUs will.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@cache
def rows_are_scaled() -> bool:
    """Returns True if this torch multiplies with row scales on a CPU."""
    with _disable_current_modes():
        ones, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
        try:
            torch.ops.aten._scaled_mm.default(ones, ones.t(), scale, scale.t(), out_dtype=torch.bfloat16)
        except RuntimeError:
            return False
        return True


def row_scales() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which a CPU multiplies with row scales, in float32 if necessary."""
    return contextlib.nullcontext() if rows_are_scaled() else InFloat32()


class InFloat32(TorchDispatchMode):
    """Products in float8 with a scale for each row, as products in float32; everything else as it is."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind is not torch.Tensor and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # a tensor of torchao's, whose own products come here again
        if func is torch.ops.aten._scaled_mm.default and args[0].device.type == "cpu":
            return _product(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """Multiplies as `torch._scaled_mm`: a [m, k], b [k, n]; scale_a [m, 1] and scale_b [1, n], or one number each."""
    product = (a.to(torch.float32) @ b.to(torch.float32)) * scale_a * scale_b
    if bias is not None:
        product = product + bias
    if scale_result is not None:
        product = product * scale_result
    return product.to(out_dtype or a.dtype)


__all__ = ["InFloat32", "row_scales", "rows_are_scaled"]
