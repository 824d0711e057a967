"""Weights in the blocks of GGUF files, unpacked by diffusers' functions: plain operations, which programs can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffkiln.interpreter.layers.storage import Parts, Shape, StorageFormat


@dataclass(frozen=True)
class GGUF(StorageFormat):
    """One of GGUF's types, such as Q4_K: `row_bytes` bytes for each row of a matrix."""

    name: ClassVar[str] = "gguf"

    kind: str
    row_bytes: int

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        return {"data": ((shape[0], self.row_bytes), torch.uint8)}

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return unpacked(parts["data"], self.kind, shape).to(dtype)


def unpacked(data: torch.Tensor, kind: str, shape: Shape) -> torch.Tensor:
    """Returns the values of packed rows, in the type in which diffusers computes them (float16 for most).

    Raises:
        ImportError: the package gguf is not installed.
    """
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions
    from gguf import GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = data.reshape(-1, size)
    return dequantize_functions[GGMLQuantizationType[kind]](blocks, block, size).reshape(shape)
