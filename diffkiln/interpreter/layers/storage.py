"""Forms in which a weight is stored, and the plain operations that give it back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from diffkiln.interpreter.dtypes import DTYPES

_TINY = torch.finfo(torch.float32).tiny

Shape = tuple[int, ...]
Parts = dict[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True)
class StorageFormat(ABC):
    """The format in which a weight is stored. Its fields are its options.

    Class attributes: `name`, the word in a bundle; `stores`, which parameters of a layer; `step`, how far a number
    moves at most when it is rounded to the format, as a part of the largest near it, where `rounded` can do that.
    """

    name: ClassVar[str]
    stores: ClassVar[tuple[str, ...]] = ("weight",)
    step: ClassVar[str] = ""

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON."""
        return asdict(self)

    @abstractmethod
    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        """Returns the tensors that a parameter of this shape and type is stored as: part → shape, dtype."""

    @abstractmethod
    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Returns the parameter, built from its parts."""

    def rounded(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the parts that are nearest to another weight, in the place of these; tables stay.

        Raises:
            NotImplementedError: the format has no `step`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Cast(StorageFormat):
    """A smaller floating type, such as float8, cast when it is used. The bias too."""

    name: ClassVar[str] = "cast"
    stores: ClassVar[tuple[str, ...]] = ("weight", "bias")

    storage: str = "float8_e4m3fn"

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        return {"data": (shape, DTYPES[self.storage])}

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return parts["data"].to(dtype)


@dataclass(frozen=True)
class Int8(StorageFormat):
    """int8 [rows, columns] with one scale a row: weight = data × scale."""

    name: ClassVar[str] = "int8"

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        return {"data": (shape, torch.int8), "scale": ((shape[0], 1), torch.float32)}

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return (parts["data"].to(torch.float32) * parts["scale"]).to(dtype)


@dataclass(frozen=True)
class Int4(StorageFormat):
    """Whole numbers from −8 to 7, two in a byte (the low half is the even column), with one scale a group of a row.

    The number of columns is a multiple of `group_size`.
    """

    name: ClassVar[str] = "int4"
    step: ClassVar[str] = "1/14 of the largest of its group"

    group_size: int = 64

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        rows, columns = shape
        return {
            "data": ((rows, columns // 2), torch.uint8),
            "scale": ((rows, columns // self.group_size), dtype),
        }

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        data = parts["data"]
        numbers = torch.stack((data & 15, data >> 4), dim=-1).to(dtype) - 8
        grouped = numbers.reshape(shape[0], -1, self.group_size) * parts["scale"].unsqueeze(-1)
        return grouped.reshape(shape)

    def rounded(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        grouped = weight.reshape(weight.shape[0], -1, self.group_size)
        scale = (grouped.abs().amax(-1) / 7).clamp_min(_TINY).to(parts["scale"].dtype)
        numbers = (grouped / scale.unsqueeze(-1)).round().clamp(-8, 7).reshape(weight.shape).to(torch.int8) + 8
        nibbles = numbers.to(torch.uint8)
        return {"data": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), "scale": scale}


@dataclass(frozen=True)
class FourBit(StorageFormat):
    """bitsandbytes' 4-bit: indices into a table of 16 numbers, two in a byte (the high half comes first), with the
    largest magnitude of each block of `block_size` weights, which is 8-bit itself where it is `nested`.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes, functional.py: dequantize_4bit.
    """

    name: ClassVar[str] = "four_bit"
    step: ClassVar[str] = "1/6 of the largest of its block"
    nested_block: ClassVar[int] = 256

    block_size: int = 64
    nested: bool = False

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        count = math.prod(shape)
        blocks = -(-count // self.block_size)
        parts: Parts = {"data": ((-(-count // 2),), torch.uint8), "table": ((16,), torch.float32)}
        if not self.nested:
            return parts | {"absmax": ((blocks,), torch.float32)}
        return parts | {
            "absmax": ((blocks,), torch.uint8),
            "absmax_table": ((256,), torch.float32),
            "absmax_scale": ((-(-blocks // self.nested_block),), torch.float32),
            "absmax_offset": ((), torch.float32),
        }

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        data, count = parts["data"], math.prod(shape)
        indices = torch.stack((data >> 4, data & 15), dim=-1).reshape(-1).to(torch.int32)
        values = parts["table"].index_select(0, indices)
        scaled = _blockwise(values, self._absmax(parts), self.block_size)
        return scaled[:count].reshape(shape).to(dtype)

    def rounded(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        blocks = _in_blocks(weight.reshape(-1), self.block_size)
        new = self._rounded_absmax(blocks.abs().amax(-1), parts)
        absmax = self._absmax({**parts, **new})
        indices = nearest(blocks / absmax.clamp_min(_TINY).unsqueeze(-1), parts["table"]).reshape(-1)
        nibbles = indices[: 2 * parts["data"].numel()].to(torch.uint8)
        nibbles = torch.nn.functional.pad(nibbles, (0, 2 * parts["data"].numel() - nibbles.numel()))
        return new | {"data": (nibbles[0::2] << 4) | nibbles[1::2]}

    def _rounded_absmax(self, absmax: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.nested:
            return {"absmax": absmax}
        blocks = _in_blocks(absmax - parts["absmax_offset"], self.nested_block)
        scale = blocks.abs().amax(-1).clamp_min(_TINY)
        indices = nearest(blocks / scale.unsqueeze(-1), parts["absmax_table"]).reshape(-1)
        return {"absmax": indices[: absmax.numel()].to(torch.uint8), "absmax_scale": scale}

    def _absmax(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if not self.nested:
            return parts["absmax"]
        values = parts["absmax_table"].index_select(0, parts["absmax"].to(torch.int32))
        return _blockwise(values, parts["absmax_scale"], self.nested_block) + parts["absmax_offset"]


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns the index of the number in a table that is nearest to each value."""
    ordered, positions = table.sort()
    borders = (ordered[1:] + ordered[:-1]) / 2
    return positions[torch.bucketize(values, borders)]


def _in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns values [n] as blocks [⌈n/size⌉, size], filled with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[0] % size)).reshape(-1, size)


def _blockwise(values: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """Multiplies values [n] by the scale of their block [⌈n/size⌉]; returns [n]."""
    count, blocks = values.shape[0], scales.shape[0]
    padded = torch.nn.functional.pad(values, (0, blocks * size - count)) if blocks * size != count else values
    return (padded.reshape(blocks, size) * scales.unsqueeze(-1)).reshape(-1)[:count]


@dataclass(frozen=True)
class Sparse24(StorageFormat):
    """2:4 semi-structured: of each four neighbours in a row two are kept.

    `data` holds the two, `where` their places in the four: one byte with two bits each for two fours.
    """

    name: ClassVar[str] = "sparse_2_4"

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        rows, columns = shape
        return {"data": ((rows, columns // 2), dtype), "where": ((rows, columns // 8), torch.uint8)}

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        where = parts["where"]
        indices = torch.stack([(where >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(shape[0], -1, 2)
        kept = parts["data"].reshape(shape[0], -1, 2)
        dense = kept.new_zeros(shape[0], kept.shape[1], 4)
        return dense.scatter(-1, indices.to(torch.int64), kept).reshape(shape)


@dataclass(frozen=True)
class LowRank(StorageFormat):
    """Another form, and beside it two narrow matrices whose product is added: weight = form + up × down.

    `form` and `settings` are the other form's name and options. The factors have the weight's type if that has two
    bytes, and else float16.
    """

    name: ClassVar[str] = "low_rank"

    form: str = Int8.name
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rank: int = 1

    @property
    def inner(self) -> StorageFormat:
        """Returns the other form."""
        return STORAGE_FORMATS[self.form](**self.settings)

    def parts(self, shape: Shape, dtype: torch.dtype) -> Parts:
        rows, columns = shape
        narrow = dtype if dtype.itemsize == 2 else torch.float16
        factors: Parts = {"down": ((self.rank, columns), narrow), "up": ((rows, self.rank), narrow)}
        return self.inner.parts(shape, dtype) | factors

    def restore(self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return self.inner.restore(parts, shape, dtype) + parts["up"].to(dtype) @ parts["down"].to(dtype)


STORAGE_FORMATS: dict[str, Any] = {storage.name: storage for storage in (Cast, Int8, Int4, FourBit, Sparse24, LowRank)}
