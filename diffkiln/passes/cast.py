"""Cast a component's weights to another floating-point type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.passes.base import Fact, Pass


class Cast(Pass):
    """Cast a component's weights to another floating-point type.

    Modules that diffusers keeps in float32 (`_keep_in_fp32_modules`) stay in float32.
    """

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "cast a component's weights to float32, bfloat16 or float16"
    requires_not: ClassVar = {"quantized": "quantized weights have the type that quantization gave them"}

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="The type that the weights get.")

    def provides(self) -> Iterable[Fact]:
        return [Fact("cast", self.component)]

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        dtype = getattr(torch, self.dtype)
        kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        count = 0
        for path, part in module.named_modules():
            tables: list[Any] = [part._parameters, part._buffers]
            for table in tables:
                for key, tensor in table.items():
                    if tensor is None or kept & {key, *path.split(".")}:
                        continue
                    if not tensor.is_floating_point() or tensor.dtype == dtype:
                        continue
                    cast = tensor.detach().to(dtype)
                    weight = isinstance(tensor, torch.nn.Parameter)
                    table[key] = torch.nn.Parameter(cast, requires_grad=False) if weight else cast
                    count += 1
        return [f"{count} tensors to {self.dtype}"] if count else []
