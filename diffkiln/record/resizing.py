"""Pillow's resizing of pictures, and torch's of bytes, as products of matrices of whole numbers.

Both weigh pixels by whole numbers, add half, shift to the right and cut off at 0 and 255: along each row, then along
each column. Sums of such products are below 2⁵³, so float64 has them exactly, in whatever order they are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from diffkiln.errors import RecordError
from diffkiln.program.images import TORCH_BICUBIC

#: Bits after the point of Pillow's weights.
_PILLOW_BITS = 22


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3.0 <= x < 3.0 else 0.0


#: Filter → its function, and how far it reaches.
_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
    TORCH_BICUBIC: (_bicubic, 2.0),
}


def resized(numbers: torch.Tensor, width: int, height: int, name: str) -> torch.Tensor:
    """Returns pictures at another size, as a filter gives them.

    Args:
        numbers: float64 [images, channels, height, width], whole numbers from 0 to 255.
        width, height: wanted.
        name: of the filter, one of `diffkiln.program.images`.

    Raises:
        RecordError: it is another kind of filter.
    """
    if name not in _FILTERS:
        raise RecordError(f"the filter {name} of resizing is not recorded")
    if numbers.shape[-1] != width:
        across, bits = weights(numbers.shape[-1], width, name)
        numbers = _shifted(numbers @ across.T, bits)
    if numbers.shape[-2] != height:
        down, bits = weights(numbers.shape[-2], height, name)
        numbers = _shifted(down @ numbers, bits)
    return numbers


def _shifted(sums: torch.Tensor, bits: int) -> torch.Tensor:
    return ((sums + 2.0 ** (bits - 1)) * 2.0**-bits).floor().clamp(0, 255)


@lru_cache(maxsize=16)
def weights(before: int, after: int, name: str) -> tuple[torch.Tensor, int]:
    """Returns the weights of a filter, float64 [after, before], whole numbers; and their bits after the point."""
    function, reach = _FILTERS[name]
    scale = before / after
    stretch = max(scale, 1.0)
    rows = []
    for index in range(after):
        center = (index + 0.5) * scale
        first = max(int(center - reach * stretch + 0.5), 0)
        last = min(int(center + reach * stretch + 0.5), before)
        own = [function((pixel - center + 0.5) * (1.0 / stretch)) for pixel in range(first, last)]
        total = 0.0
        for weight in own:  # in the order in which Pillow adds
            total += weight
        rows.append((first, [weight / total for weight in own]))
    bits = _PILLOW_BITS if name != TORCH_BICUBIC else _torch_bits(max(max(own) for _, own in rows))
    table = torch.zeros(after, before, dtype=torch.float64)
    for index, (first, own) in enumerate(rows):
        whole = [float(int(math.copysign(0.5, weight) + weight * (1 << bits))) for weight in own]
        table[index, first : first + len(own)] = torch.tensor(whole, dtype=torch.float64)
    return table, bits


def _torch_bits(largest: float) -> int:
    """Returns how many bits after the point torch gives its weights: as many as 16 hold."""
    bits = 0
    while bits < _PILLOW_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits
