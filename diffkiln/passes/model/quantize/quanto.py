"""quanto (optimum-quanto): int8 weights, for compatibility with models that were made with it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.interpreter.layers import Int8, store
from diffkiln.passes.layers import has_no_data
from diffkiln.passes.model.quantize.base import BACKEND, TYPE, Quantize


class QuantoInt8(Quantize):
    """int8 weights with one scale a row; quanto chooses the numbers and the scales.

    The layers give their weights back with ordinary operations.
    """

    package: ClassVar[str] = "optimum.quanto"
    extra: ClassVar[str] = "quanto"

    backend: Literal["quanto"] = Field(description=BACKEND)
    type: Literal["int8"] = Field(description=TYPE)

    def quantize(self, layer: torch.nn.Linear) -> None:
        if has_no_data(layer.weight):
            return store(layer, Int8())
        from optimum.quanto import absmax_scale, qint8, quantize_weight

        weight = layer.weight.detach()
        scale = absmax_scale(weight, qint8, axis=0)
        quantized: Any = quantize_weight(weight, qtype=qint8, axis=0, scale=scale, optimized=False)
        parts = {"weight_data": quantized._data, "weight_scale": quantized._scale.to(torch.float32)}
        return store(layer, Int8(), parts)


TYPES = (QuantoInt8,)
