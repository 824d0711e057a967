"""Learned perceptual similarity (Zhang et al., 2018) with VGG-16: 0 for equal pictures."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from diffkiln.compiler.metrics import About, Pair, PairMetric
from diffkiln.errors import SourceError

_FILE = "model.safetensors"
#: Channels of VGG-16's convolutions in five stages; between stages a side is halved.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: By which LPIPS moves and scales pictures of -1 to 1, for each channel.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(PairMetric):
    """LPIPS with the linear layers that torchmetrics brings. The backbone is a folder with VGG-16's weights.

    They lie in model.safetensors by torchvision's names, such as `features.0.weight`, as in timm/vgg16.tv_in1k. The
    class of torchmetrics downloads them, and needs a torchvision that fits torch's build.
    """

    better = "lower"
    backbone = "vgg16"

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured: also for pictures that are nothing after five stages."""
        small = min(about.height, about.width) < 16
        return "needs pictures of at least 16 pixels a side" if small else super().objection(about)

    def value(self, pair: Pair, about: About) -> float:
        """Returns the mean over the frames."""
        network = _network(about.backbones[self.backbone])
        with torch.inference_mode():
            return float(network(pair.picture, pair.reference).mean())


class Network(nn.Module):
    """VGG-16 in five stages, and a weight for each channel of each stage."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *(width for stage in _STAGES for width in stage)]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.convolutions = nn.ModuleList(convolutions)
        self.weights = nn.ParameterList([torch.zeros(1, stage[-1], 1, 1) for stage in _STAGES])
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns the distance of each pair of pictures, [pictures, 3, height, width] from 0 to 1: [pictures]."""
        found = zip(self._stages(one), self._stages(other), self.weights, strict=True)
        apart = [((_unit(a) - _unit(b)) ** 2 * weight).sum(1).mean((1, 2)) for a, b, weight in found]
        return torch.stack(apart).sum(0)

    def _stages(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        value, rest, found = (pictures * 2 - 1 - self.shift) / self.scale, iter(self.convolutions), []
        for number, stage in enumerate(_STAGES):
            value = nn.functional.max_pool2d(value, 2) if number else value
            for _ in stage:
                value = nn.functional.relu(next(rest)(value))
            found.append(value)
        return found


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Returns features of which each pixel's have length 1."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def positions() -> list[int]:
    """Returns the numbers of the convolutions among VGG-16's layers, in which activations and pooling count."""
    found: list[int] = []
    at = 0
    for stage in _STAGES:
        for _ in stage:
            found.append(at)
            at += 2
        at += 1
    return found


@functools.cache
def _network(folder: Path) -> Network:
    """Returns the network with the weights of a folder; nothing is downloaded.

    Raises:
        SourceError: the folder has no such weights.
    """
    import torchmetrics
    from safetensors.torch import load_file

    if not (folder / _FILE).is_file():
        raise SourceError(f"--backbone vgg16: {folder} has no {_FILE}. Save VGG-16's weights as safetensors")
    found, network = load_file(folder / _FILE), Network()
    for at, part in zip(positions(), network.convolutions, strict=True):
        try:
            part.load_state_dict({leaf: found[f"features.{at}.{leaf}"] for leaf in ("weight", "bias")})
        except (KeyError, RuntimeError):
            raise SourceError(f"--backbone vgg16: {folder} has no features.{at} of VGG-16") from None
    linear = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    given = torch.load(linear, map_location="cpu", weights_only=True)
    for number, weight in enumerate(network.weights):
        weight.data.copy_(given[f"lin{number}.model.1.weight"])
    return network.eval().requires_grad_(False)


PLUGIN = Lpips()
