from __future__ import annotations

import struct
from pathlib import Path

import pytest

from diffkiln.exporters.aot_inductor.cubins import cubins_of


def header(machine: int, flags: int, abi: int) -> bytes:
    """A 64-bit little-endian ELF header."""
    identity = b"\x7fELF\x02\x01\x01" + bytes([0x33, abi]) + bytes(7)
    return identity + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("flags", "abi", "sm"),
    [
        (0x590559, 7, "sm_89"),  # as ptxas 12.9 writes it
        (0x5A0D5A, 7, "sm_90a"),
        (0x50 << 8, 8, "sm_80"),
        (0x78 << 8 | 0x8, 8, "sm_120a"),
    ],
)
def test_the_header_says_the_sm(flags: int, abi: int, sm: str, tmp_path: Path) -> None:
    file = tmp_path / "kernel.cubin"
    file.write_bytes(header(190, flags, abi))
    assert [(cubin.sm, cubin.offset) for cubin in cubins_of(file)] == [(sm, 0)]


def test_those_inside_a_shared_object_are_found_and_it_is_none_itself(tmp_path: Path) -> None:
    file = tmp_path / "engine.so"
    host = header(62, 0, 0)
    file.write_bytes(host + b"data" + header(190, 0x590559, 7) + b"\x7fELF" + header(190, 0x500550, 7) + host[:20])
    assert [(cubin.sm, cubin.offset) for cubin in cubins_of(file)] == [("sm_89", 68), ("sm_80", 136)]


def test_a_layout_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "kernel.cubin"
    file.write_bytes(header(190, 0x59, 99))
    with pytest.raises(ValueError, match="ABI version 99"):
        cubins_of(file)
