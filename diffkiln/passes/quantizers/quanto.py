"""quanto (optimum-quanto): int8 weights, for compatibility with models that were made with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from diffkiln.interpreter.layers import Int8, store
from diffkiln.passes.quantizers.base import Layers, Quantizer, Settings, is_ghost


class Quanto(Quantizer):
    """quanto chooses the numbers and the scales; the layers give their weights back with ordinary operations."""

    package: ClassVar[str] = "optimum.quanto"
    extra: ClassVar[str] = "quanto"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"int8": ()}

    def quantize(self, module: torch.nn.Module, layers: Layers, settings: Settings) -> None:
        for layer in layers.values():
            _int8(layer)


def _int8(layer: torch.nn.Linear) -> None:
    if is_ghost(layer.weight):
        return store(layer, Int8())
    from optimum.quanto import absmax_scale, qint8, quantize_weight

    weight = layer.weight.detach()
    scale = absmax_scale(weight, qint8, axis=0)
    quantized: Any = quantize_weight(weight, qtype=qint8, axis=0, scale=scale, optimized=False)
    parts = {"weight_data": quantized._data, "weight_scale": quantized._scale.to(torch.float32)}
    return store(layer, Int8(), parts)
