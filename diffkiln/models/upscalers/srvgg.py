"""Real-ESRGAN's compact network (SRVGGNetCompact): convolutions in a row, and pixels shuffled at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from diffkiln.models.upscalers import filled

_FIRST, _SLOPES = "body.0.weight", "body.1.weight"


class SRVGGNetCompact(nn.Module):
    """The network: what its convolutions find is added to the picture, enlarged by the nearest pixel."""

    def __init__(self, width: int, convolutions: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.PReLU(width)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.PReLU(width)]
        self.body = nn.ModuleList([*layers, nn.Conv2d(width, 3 * scale**2, 3, 1, 1)])

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns enlarged pictures, [batch, 3, height, width], from 0 to 1."""
        found = pictures
        for layer in self.body:
            found = layer(found)
        enlarged = functional.interpolate(pictures, scale_factor=self.scale, mode="nearest")
        return functional.pixel_shuffle(found, self.scale) + enlarged


class _Compact:
    """The plug-in."""

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Returns True for a row of convolutions with slopes between them, from three colours to enlarged ones."""
        first, last = shapes.get(_FIRST, ()), shapes.get(_last(shapes), ())
        row = len(first) == len(last) == 4 and first[1] == 3 and len(shapes.get(_SLOPES, ())) == 1
        return row and all(name.startswith("body.") for name in shapes) and bool(_scale(last[0]))

    def made(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Returns the network with these weights."""
        last = _last(tensors)
        convolutions = int(last.split(".")[1]) // 2 - 1
        scale = _scale(tensors[last].shape[0])
        return filled(lambda: SRVGGNetCompact(tensors[_FIRST].shape[0], convolutions, scale), tensors)


def _last(names: Mapping[str, object]) -> str:
    """Returns the name of the last convolution's weight; "" if there is none."""
    indices = [int(name.split(".")[1]) for name in names if name.startswith("body.") and name.split(".")[1].isdigit()]
    return f"body.{max(indices)}.weight" if indices else ""


def _scale(channels: int) -> int:
    """Returns how many pixels of a side the channels are; 0 if they are no square of pixels of three colours."""
    scale = math.isqrt(channels // 3)
    return scale if 3 * scale**2 == channels else 0


PLUGIN = _Compact()
