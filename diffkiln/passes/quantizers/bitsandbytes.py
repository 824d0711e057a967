"""bitsandbytes: int8, NF4 and FP4 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from diffkiln.interpreter.layers import FourBit, Int8, store
from diffkiln.passes.quantizers.base import Layers, Quantizer, Settings, is_ghost

_FOUR_BIT = ("nf4", "fp4")
#: int8 weights are multiples of absmax / 127.
_INT8_MAX = 127.0


class BitsAndBytes(Quantizer):
    """bitsandbytes quantizes; the layers then give their weights back with ordinary operations, in any process.

    `int8` is the weights' part of LLM.int8(): the activations stay as they are, which loses less than they would in
    bitsandbytes' own kernel and makes the result the same on every machine.
    """

    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bitsandbytes"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "int8": (),
        "nf4": ("double_quant",),
        "fp4": ("double_quant",),
    }
    compiles: ClassVar[str] = (
        "bitsandbytes multiplies in kernels of its own, which are not exported, and an engine would unpack every "
        "weight again at every call. Quantize it with torchao, or do not compile it"
    )

    def quantize(self, module: torch.nn.Module, layers: Layers, settings: Settings) -> None:
        for layer in layers.values():
            if settings.type in _FOUR_BIT:
                _four_bit(layer, settings)
            else:
                _int8(layer)


def _int8(layer: torch.nn.Linear) -> None:
    if is_ghost(layer.weight):
        return store(layer, Int8())
    from bitsandbytes.functional import int8_vectorwise_quant

    data, absmax, _ = int8_vectorwise_quant(layer.weight.detach().to(torch.float16))
    return store(layer, Int8(), {"weight_data": data, "weight_scale": absmax.unsqueeze(-1) / _INT8_MAX})


def _four_bit(layer: torch.nn.Linear, settings: Settings) -> None:
    form = FourBit(nested=settings.double_quant)
    if is_ghost(layer.weight):
        return store(layer, form)
    from bitsandbytes.functional import quantize_4bit

    state: Any
    packed, state = quantize_4bit(
        layer.weight.detach(),
        blocksize=form.block_size,
        compress_statistics=form.nested,
        quant_type=settings.type,
    )
    parts = {"weight_data": packed.reshape(-1), "weight_table": state.code, "weight_absmax": state.absmax}
    if form.nested:
        parts |= {
            "weight_absmax_table": state.state2.code,
            "weight_absmax_scale": state.state2.absmax,
            "weight_absmax_offset": state.offset,
        }
    return store(layer, form, parts)
