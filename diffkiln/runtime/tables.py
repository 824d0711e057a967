"""Tables of safetensors files: what tensors there are, and where they lie, checked before a tensor is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffkiln.bundle import Verified
from diffkiln.bundle.layout import CHANNELS_LAST
from diffkiln.errors import ManifestInvalid
from diffkiln.guards.limits import active

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype, shape as it lies there, and its bytes [start, end) in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    channels_last: bool = False

    @property
    def used_shape(self) -> tuple[int, ...]:
        """Returns the shape in which programs use the tensor."""
        if not self.channels_last:
            return self.shape
        count, height, width, channels = self.shape
        return count, channels, height, width

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def of(self, raw: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as a view of its bytes."""
        # A byte that is neither 0 nor 1 is not a boolean: compilers take it for one or the other, as it suits them.
        tensor = (raw != 0 if self.dtype == torch.bool else raw.view(self.dtype)).reshape(self.shape)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor

    def view_of(self, raw: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as a view of its bytes as they are, which `clean` has made booleans where it is one."""
        tensor = raw.view(self.dtype).reshape(self.shape)
        return tensor.permute(0, 3, 1, 2) if self.channels_last else tensor

    def clean(self, raw: torch.Tensor) -> None:
        """Makes the bytes of booleans 0 or 1, in place."""
        if self.dtype == torch.bool:
            raw.copy_(raw != 0)

    def bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the bytes of a tensor that `of` gave, as a view; not those of booleans, which `of` copies."""
        stored = tensor.permute(0, 2, 3, 1) if self.channels_last else tensor
        return stored.reshape(-1).view(torch.uint8)


def read_table(path: str, size: int, pread: Callable[[int, int], bytes]) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file as it stands there, within limits, and its length in bytes.

    Args:
        path: Its name, for messages.
        size: Its size in bytes.
        pread: Gives so many bytes of it, from an offset on.

    Raises:
        ManifestInvalid: The header is not a JSON object.
        LimitExceeded: It is longer, or has more rows, than the limits allow.
    """
    if size < 8:
        raise ManifestInvalid(f"{path!r} is too short for a safetensors file")
    (length,) = struct.unpack("<Q", pread(8, 0))
    if length > size - 8:
        raise ManifestInvalid(f"{path!r}: its header claims {length} bytes of {size}")
    active().check("header_bytes", length, path)
    try:
        table = json.loads(pread(length, 8))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: {error}") from None
    if not isinstance(table, dict):
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: it is not an object")
    active().check("header_rows", len(table), path)
    return table, length


def read_header(verified: Verified, path: str) -> tuple[dict[str, Entry], int, int]:
    """Returns the tensors of a safetensors file, the offset of its data and the data's size, all checked.

    Raises:
        ManifestInvalid: the header is not one.
        LimitExceeded: it is longer, or has more rows, than the limits allow.
    """
    size = verified.size(path)
    table, length = read_table(path, size, partial(verified.peek, path))
    data = size - 8 - length
    return entries_of(table, data, path), 8 + length, data


def entries_of(table: Mapping[str, Any], size: int, path: str) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by name, none of which overlaps another.

    Args:
        table: The file's header.
        size: Bytes of the data behind it.
        path: The file's name, for messages.

    Raises:
        ManifestInvalid: A row is malformed, or its tensor does not fit.
    """
    try:
        turned = json.loads(table.get("__metadata__", {}).get(CHANNELS_LAST, "[]"))
        if not isinstance(turned, list) or any(len(table[name]["shape"]) != 4 for name in turned):
            raise ValueError(f"{CHANNELS_LAST} must list tensors of four dimensions")
        last = set(turned)
        entries = {name: _entry(row, size, name in last) for name, row in table.items() if name != "__metadata__"}
        _refuse_overlaps(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestInvalid(f"{path!r} has a broken safetensors header: {error}") from None
    return entries


def _entry(row: Mapping[str, Any], size: int, channels_last: bool) -> Entry:
    dtype, (start, end) = _DTYPES[row["dtype"]], row["data_offsets"]
    shape = tuple(row["shape"])
    if not all(type(n) is int for n in (start, end, *shape)) or any(n < 0 for n in shape):
        raise ValueError(f"a tensor {row} whose sizes are not whole numbers")
    # Zeros count as one: torch multiplies from left to right and must not overflow on the way.
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError(f"a tensor {row} of more elements than 64 bits count")
    if not 0 <= start <= end <= size or math.prod(shape) * dtype.itemsize != end - start or start % dtype.itemsize:
        raise ValueError(f"a tensor {row} that does not fit {size} bytes")
    return Entry(dtype, shape, start, end, channels_last)


def _refuse_overlaps(entries: Mapping[str, Entry]) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise ValueError(f"the tensor {name} begins before another one ends")
        end = entry.end
