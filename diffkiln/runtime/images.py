"""Tensors to what callers ask for, rounded as diffusers' image and video processors round."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffkiln.errors import CallError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: What the original pipeline gives where it is not asked: pictures as "pil", the rest as its own default has it.
OWN = "own"


def check_output_type(output_type: Any) -> None:
    """Raises `CallError` for an output type that there is not."""
    if output_type not in (*OUTPUT_TYPES, OWN):
        raise CallError(f"output_type: {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")


def convert(tensor: torch.Tensor, output_type: str) -> Any:
    """Returns images or videos in the form that `output_type` names.

    Args:
        tensor: float [images, channels, height, width] or [videos, frames, channels, height, width], 0 to 1.
        output_type: "pt" gives the tensor, "np" float32 arrays with channels last, "pil" `PIL.Image`s (for videos a
            list of them a video).
    """
    if output_type == "pt":
        return tensor
    array = tensor.cpu().movedim(-3, -1).float().numpy()
    if output_type == "np":
        return array
    return [_pictures(item) for item in array] if array.ndim == 5 else _pictures(array)


def _pictures(array: Any) -> list[Any]:
    from PIL import Image

    with np.errstate(invalid="ignore"):  # allow_nan: what is no number becomes black
        pixels = (array * 255).round().astype("uint8")
    return [Image.fromarray(item.squeeze(-1) if item.shape[-1] == 1 else item) for item in pixels]
