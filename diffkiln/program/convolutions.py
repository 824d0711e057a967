"""Whether a region's convolutions gain from channels that come last."""

from __future__ import annotations

from diffkiln.program.ir import Op, Program, Ref


def heavy_weights(region: Program) -> bool:
    """Returns True if the weights of a region's convolutions are larger than what is convolved.

    Inductor lays everything out with channels last. Weights are inputs of an engine, so it copies them at every call.
    That pays where the images are large, as in a decoder, and costs up to 2.7 times where the weights are, as in the
    middle of a U-Net.
    """
    weights = images = 0
    for op in region.ops:
        if is_convolution(op):
            image, weight = op.args[0], op.args[1]
            assert isinstance(image, Ref)
            assert isinstance(weight, Ref)
            weights += region.types[weight.name].numel
            images += region.types[image.name].numel + region.types[op.outputs[0]].numel
    return weights > images


def is_convolution(op: Op) -> bool:
    """Returns True for an operator that convolves."""
    return op.name.startswith(("aten.conv1d.", "aten.conv2d.", "aten.conv3d.", "aten.convolution."))
