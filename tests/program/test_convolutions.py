"""Which convolutions gain from channels that come last."""

from __future__ import annotations

import pytest

from diffkiln.program import Input, Op, Program, Ref, TensorType
from diffkiln.program.convolutions import heavy_weights


def convolution(size: int, channels: int, name: str = "aten.conv2d.default") -> Program:
    image, weight = TensorType("float32", (1, channels, size, size)), TensorType("float32", (channels, channels, 3, 3))
    types = {"%x": image, "@w": weight, "%1": image}
    ops = (Op(name, (Ref("%x"), Ref("@w")), ("%1",)),)
    return Program("block", (Input("%x", image),), ops, (Ref("%1"),), types)


@pytest.mark.parametrize("name", ["aten.conv2d.default", "aten.convolution.default"])
def test_the_middle_of_a_unet_has_heavy_weights_and_a_decoder_has_not(name: str) -> None:
    assert heavy_weights(convolution(8, 640, name))
    assert not heavy_weights(convolution(256, 128, name))


def test_a_region_without_convolutions_has_none() -> None:
    assert not heavy_weights(convolution(8, 640, "aten.mul.Tensor"))
