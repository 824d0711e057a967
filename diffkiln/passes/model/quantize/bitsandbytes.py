"""bitsandbytes: int8, NF4 and FP4 weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.interpreter.layers import FourBit, Int8, store
from diffkiln.passes.layers import has_no_data
from diffkiln.passes.model.quantize.base import BACKEND, TYPE, Quantize
from diffkiln.passes.variants import constant

#: int8 weights are multiples of absmax / 127.
_INT8_MAX = 127.0


class BitsAndBytes(Quantize):
    """bitsandbytes quantizes; the layers then give their weights back with ordinary operations, in any process."""

    package: ClassVar[str] = "bitsandbytes"
    extra: ClassVar[str] = "bitsandbytes"
    uncompiled: ClassVar[str] = (
        "bitsandbytes multiplies in kernels of its own, which are not exported, and an engine would unpack every "
        "weight again at every call. Quantize it with torchao, or do not compile it"
    )

    backend: Literal["bitsandbytes"] = Field(description=BACKEND)


class BitsAndBytesInt8(BitsAndBytes):
    """int8 weights with one scale a row.

    They are the weights' part of LLM.int8(): the activations stay as they are, which loses less than they would in
    bitsandbytes' own kernel and makes the result the same on every machine.
    """

    type: Literal["int8"] = Field(description=TYPE)

    def quantize(self, layer: torch.nn.Linear) -> None:
        if has_no_data(layer.weight):
            return store(layer, Int8())
        from bitsandbytes.functional import int8_vectorwise_quant

        data, absmax, _ = int8_vectorwise_quant(layer.weight.detach().to(torch.float16))
        return store(layer, Int8(), {"weight_data": data, "weight_scale": absmax.unsqueeze(-1) / _INT8_MAX})


class BitsAndBytes4Bit(BitsAndBytes):
    """4-bit weights with one scale for 64 of them."""

    double_quant: bool = Field(False, description="Quantize the scales too.")

    def quantize(self, layer: torch.nn.Linear) -> None:
        storage = FourBit(nested=self.double_quant)
        if has_no_data(layer.weight):
            return store(layer, storage)
        from bitsandbytes.functional import quantize_4bit

        state: Any
        packed, state = quantize_4bit(
            layer.weight.detach(),
            blocksize=storage.block_size,
            compress_statistics=storage.nested,
            quant_type=constant(type(self), "type"),
        )
        parts = {"weight_data": packed.reshape(-1), "weight_table": state.code, "weight_absmax": state.absmax}
        if storage.nested:
            parts |= {
                "weight_absmax_table": state.state2.code,
                "weight_absmax_scale": state.state2.absmax,
                "weight_absmax_offset": state.offset,
            }
        return store(layer, storage, parts)


class NF4(BitsAndBytes4Bit):
    """4-bit NormalFloat weights with one scale for 64 of them."""

    type: Literal["nf4"] = Field(description=TYPE)


class FP4(BitsAndBytes4Bit):
    """4-bit floating-point weights with one scale for 64 of them."""

    type: Literal["fp4"] = Field(description=TYPE)


TYPES = (BitsAndBytesInt8, NF4, FP4)
