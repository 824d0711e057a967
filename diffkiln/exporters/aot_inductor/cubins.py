"""GPU code inside an engine: which kernels, and for which GPU each was assembled.

A cubin is an ELF file whose header says its SM. The layout of `e_flags` is LLVM's, llvm/BinaryFormat/ELF.h
(EF_CUDA_SM, EF_CUDA_ACCELERATORS), which differs by the version of the ABI.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01\x01"
_CUDA_MACHINE = 190
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
#: Version of the ABI: (shift to the SM's number, bit of the architecture's own features, the `a` of `sm_90a`).
_LAYOUTS = {7: (0, 0x800), 8: (8, 0x8)}


@dataclass(frozen=True)
class Cubin:
    """One piece of GPU code: `sm` is "sm_89", or "sm_90a" where it uses features of that architecture alone."""

    sm: str
    offset: int


def cubins_of(library: Path) -> list[Cubin]:
    """Returns the cubins in a shared object, or in a file that is one itself.

    Raises:
        ValueError: one has a layout that is not known here.
    """
    return list(_found(library.read_bytes()))


def _found(data: bytes) -> Iterator[Cubin]:
    at = data.find(_MAGIC)
    while at >= 0:
        if at + _HEADER.size <= len(data):
            _, machine, _, _, _, _, flags, *_ = _HEADER.unpack_from(data, at)
            if machine == _CUDA_MACHINE:
                yield Cubin(_sm(flags, data[at + 8]), at)
        at = data.find(_MAGIC, at + 1)


def _sm(flags: int, abi: int) -> str:
    if abi not in _LAYOUTS:
        raise ValueError(f"a cubin of the ABI version {abi}, which is not known here")
    shift, accelerated = _LAYOUTS[abi]
    return f"sm_{flags >> shift & 0xFF}{'a' if flags & accelerated else ''}"
