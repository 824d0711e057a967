"""Noise as diffusers draws it, so that the same generator gives the same image."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch

from diffkiln.errors import CallError
from diffkiln.program import NORMAL, UNIFORM

#: What a caller may pass: nothing, one generator, or one for each image.
Generators = torch.Generator | Sequence[torch.Generator] | None


def check_generators(value: Any) -> None:
    """Raises `CallError` for what draws nothing, such as a seed."""
    each = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (each and all(isinstance(item, torch.Generator) for item in each)):
        seed = value if isinstance(value, int) and not isinstance(value, bool) else 7
        raise CallError(
            f"generator: {reprlib.repr(value)} is neither a torch.Generator nor a list of them. Write "
            f'generator=torch.Generator("cpu").manual_seed({seed})'
        )


def draw(
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: Generators,
    device: torch.device,
    distribution: str = NORMAL,
) -> torch.Tensor:
    """Draws noise by the rules of `diffusers.utils.torch_utils.randn_tensor`.

    A CPU generator draws on the CPU and the noise is moved; a CUDA generator draws on its device; a list draws each
    image by itself and must have as many generators as images.

    Args:
        shape: of the noise; the first size is the number of images.
        dtype: of the noise.
        generator: see above.
        device: where the noise is needed.
        distribution: "normal", "uniform" from 0 to 1, or "exponential" with rate 1.

    Raises:
        CallError: the number of generators, or a CUDA generator for a pipeline on the CPU.
    """
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise CallError(f"generator: {len(generator)} generators for {shape[0]} images. Give one, or one each")
        one = (1, *shape[1:])
        return torch.cat([draw(one, dtype, each, device, distribution) for each in generator])
    source = device
    if generator is not None:
        if generator.device.type == "cuda" and device.type != "cuda":
            raise CallError(
                f"generator: it draws on {generator.device}, the pipeline runs on {device}. Use a CPU generator"
            )
        source = generator.device
    if distribution == NORMAL:
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
    empty = torch.empty(tuple(shape), device=source, dtype=dtype)
    drawn = empty.uniform_ if distribution == UNIFORM else empty.exponential_
    return drawn(generator=generator).to(device)
