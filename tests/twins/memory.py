"""A kernel's memory: each pointer that it is given leads to one tensor's memory, and nowhere else.

A kernel gets an address of its own for each pointer, so far from the others that no index leads from one to another.
Loads and stores find the true place by it, if it lies within the tensor's memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

#: Bits of an address that are the place in a pointer's space. Index 0 is in the middle, since indices may be negative.
_BITS = 44
_MIDDLE = 1 << (_BITS - 1)


class Fault(Exception):
    """What a kernel or a call does that it must not."""


class Pointer(ctypes.Structure):
    """`TwinPointer` of `stand_in.h`."""

    _fields_ = (("data", ctypes.c_uint64), ("begin", ctypes.c_uint64), ("bytes", ctypes.c_uint64))

    data: int
    begin: int
    bytes: int


@dataclass(frozen=True)
class _Space:
    name: str
    pointer: Pointer


class Memory:
    """The pointers of the kernel that runs."""

    def __init__(self) -> None:
        self._spaces: list[_Space] = []

    def clear(self) -> None:
        self._spaces.clear()

    def add(self, name: str, pointer: Pointer) -> int:
        """Returns the address that a kernel gets for a pointer."""
        self._spaces.append(_Space(name, pointer))
        return (len(self._spaces) << _BITS) + _MIDDLE

    def places(self, addresses: np.ndarray, mask: np.ndarray, width: int, what: str) -> np.ndarray:
        """Returns the true addresses of the elements that a mask leaves in.

        Raises:
            Fault: one is outside of its tensor's memory.
        """
        wanted = np.broadcast_to(mask, addresses.shape).astype(bool)
        found = np.zeros_like(addresses)
        spaces = addresses >> np.uint64(_BITS)
        for number in np.unique(spaces[wanted]).tolist():
            if not 1 <= number <= len(self._spaces):
                raise Fault(f"{what} of an address that belongs to no argument")
            space = self._spaces[number - 1]
            here = wanted & (spaces == number)
            offsets = addresses[here].astype(np.int64) - ((number << _BITS) + _MIDDLE)
            places = offsets + (space.pointer.data - space.pointer.begin)
            outside = (places < 0) | (places + width > space.pointer.bytes)
            if outside.any():
                raise Fault(
                    f"{what} out of bounds: {space.name} has {space.pointer.bytes} bytes, and {int(outside.sum())} of "
                    f"{outside.size} elements lie outside, the first at {int(places[outside][0])}"
                )
            found[here] = (places + space.pointer.begin).astype(np.uint64)
        return found
