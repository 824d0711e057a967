"""ESRGAN's and Real-ESRGAN's network of residual dense blocks (RRDBNet), in the layouts of both."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from diffkiln.models.upscalers import filled

_BLOCK = re.compile(r"body\.(\d+)\.rdb1\.conv1\.weight")
_FIRST, _DENSE, _LAST = "conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"
#: What ESRGAN's own files, which enlarge four times, call the same: "model.1.sub.23" is what follows 23 blocks.
_OLD = {
    "model.0": "conv_first",
    "model.3": "conv_up1",
    "model.6": "conv_up2",
    "model.8": "conv_hr",
    "model.10": "conv_last",
}
_OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)")
_OLD_BODY = re.compile(r"model\.1\.sub\.\d+\.(weight|bias)")
#: How many pixels of a side one pixel of the features stands for, by the channels that the first convolution takes.
_UNITS = {3: 1, 12: 2, 48: 4}
_SLOPE, _RESIDUAL, _ENLARGES = 0.2, 0.2, 4


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each of which is given the results of all before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for index in range(4):
            self.add_module(f"conv{index + 1}", nn.Conv2d(width + index * growth, growth, 3, 1, 1))
        self.conv5 = nn.Conv2d(width + 4 * growth, width, 3, 1, 1)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Returns what is given with what the convolutions find, in part."""
        found = [given]
        for index in range(4):
            made = getattr(self, f"conv{index + 1}")(torch.cat(found, 1))
            found.append(functional.leaky_relu(made, _SLOPE))
        return self.conv5(torch.cat(found, 1)) * _RESIDUAL + given


class RRDB(nn.Module):
    """Three dense blocks in a row."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(width, growth)
        self.rdb2 = ResidualDenseBlock(width, growth)
        self.rdb3 = ResidualDenseBlock(width, growth)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Returns what is given with what the blocks find, in part."""
        return self.rdb3(self.rdb2(self.rdb1(given))) * _RESIDUAL + given


class RRDBNet(nn.Module):
    """The network: it enlarges features four times, which stand for `unit` pixels of a side."""

    _repeated_blocks = ("RRDB",)

    def __init__(self, width: int, growth: int, blocks: int, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.conv_first = nn.Conv2d(3 * unit**2, width, 3, 1, 1)
        self.body = nn.Sequential(*(RRDB(width, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_up2 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_hr = nn.Conv2d(width, width, 3, 1, 1)
        self.conv_last = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Returns enlarged pictures, [batch, 3, height, width], from 0 to 1."""
        height, width = pictures.shape[-2:]
        given = self._in_units(pictures, -height % self.unit, -width % self.unit)
        found = self.conv_first(given)
        found = found + self.conv_body(self.body(found))
        for convolution in (self.conv_up1, self.conv_up2):
            larger = functional.interpolate(found, scale_factor=2, mode="nearest")
            found = functional.leaky_relu(convolution(larger), _SLOPE)
        made = self.conv_last(functional.leaky_relu(self.conv_hr(found), _SLOPE))
        scale = _ENLARGES // self.unit
        return made[..., : height * scale, : width * scale]

    def _in_units(self, pictures: torch.Tensor, below: int, beside: int) -> torch.Tensor:
        """Returns the pixels of each unit as channels; a side that is no whole number of units is mirrored."""
        if below or beside:
            pictures = functional.pad(pictures, (0, beside, 0, below), "reflect")
        return pictures if self.unit == 1 else functional.pixel_unshuffle(pictures, self.unit)


class _RRDBNets:
    """The plug-in."""

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Returns True for the names of RRDBNet and three colours."""
        shapes = {_name(name): shape for name, shape in shapes.items()}
        first, last = shapes.get(_FIRST, ()), shapes.get(_LAST, ())
        return _DENSE in shapes and len(first) == 4 and first[1] in _UNITS and last[:1] == (3,)

    def made(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Returns the network with these weights."""
        tensors = {_name(name): tensor for name, tensor in tensors.items()}
        blocks = 1 + max(int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match)
        unit, growth = _UNITS[tensors[_FIRST].shape[1]], tensors[_DENSE].shape[0]
        return filled(lambda: RRDBNet(tensors[_FIRST].shape[0], growth, blocks, unit), tensors)


def _name(name: str) -> str:
    """Returns a tensor's name, of files of either layout."""
    if match := _OLD_BLOCK.fullmatch(name):
        return f"body.{match[1]}.rdb{match[2]}.conv{match[3]}.{match[4]}"
    if match := _OLD_BODY.fullmatch(name):
        return f"conv_body.{match[1]}"
    layer, _, leaf = name.rpartition(".")
    return f"{_OLD.get(layer, layer)}.{leaf}"


PLUGIN = _RRDBNets()
