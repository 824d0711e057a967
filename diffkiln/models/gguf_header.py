"""The header of a GGUF file, walked through without making anything of it.

The library makes an array of every value in the metadata, and believes every count. So the counts are added up first,
as the format is written down: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from diffkiln.errors import SourceError
from diffkiln.guards.limits import active

_STRING, _ARRAY = 8, 9
#: Type of a value → its size in bytes.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_gguf(path: Path) -> None:
    """Checks how much the header of a GGUF file makes the library do.

    Raises:
        SourceError: It is none.
        LimitExceeded: It has more tensors or values, or is longer, than the limits allow.
    """
    try:
        with path.open("rb") as file:
            _Header(file, path.name).walk()
    except (struct.error, OSError, OverflowError) as error:
        raise SourceError(f"{path.name} cannot be read: it is cut short or is not a GGUF file ({error})") from error


class _Header:
    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._values = file, name, 0

    def walk(self) -> None:
        magic, version, tensors, keys = self._numbers("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise SourceError(f"{self._name} cannot be read: it is not a GGUF file of version 2 or 3")
        active().check("header_rows", tensors, self._name)
        self._count(keys)
        for _ in range(keys):
            self._text()
            (kind,) = self._numbers("<I")
            self._value(kind, nested=False)
        for _ in range(tensors):
            self._text()
            (dimensions,) = self._numbers("<I")
            if dimensions > 8:
                raise SourceError(f"{self._name} holds a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)  # sizes, type, offset

    def _value(self, kind: int, nested: bool) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY and not nested:
            inner, count = self._numbers("<IQ")
            self._count(count)
            if inner in _SIZES:
                self._skip(_SIZES[inner] * count)
            else:
                for _ in range(count):
                    self._value(inner, nested=True)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise SourceError(f"{self._name} holds a value of the type {kind}, which GGUF does not have here")

    def _count(self, values: int) -> None:
        self._values += values
        active().check("gguf_values", self._values, self._name)

    def _text(self) -> None:
        (length,) = self._numbers("<Q")
        self._skip(length)

    def _skip(self, length: int) -> None:
        active().check("json_bytes", self._file.tell() + length, f"the header of {self._name}")
        self._file.seek(length, 1)

    def _numbers(self, storage: str) -> tuple[int, ...]:
        return struct.unpack(storage, self._file.read(struct.calcsize(storage)))
