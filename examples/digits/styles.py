"""A style of handwriting for LoRA adapters, digits that lean to the right, and how to tell it in a picture."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SLANT = 0.5  # of a slanted digit: pixels to the right for each pixel up


def slanted(images: Tensor) -> Tensor:
    """Digits that lean to the right, by `SLANT`: float32 in −1…1, of shape (n, channels, side, side), as `images`."""
    shear = torch.tensor([[1.0, SLANT, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), -1, -1)
    ink = (images + 1) / 2
    places = F.affine_grid(shear, list(ink.shape), align_corners=False)
    return 2 * F.grid_sample(ink, places, padding_mode="zeros", align_corners=False) - 1


def slant(image: object) -> float:
    """How far a bright digit leans to the right, in pixels for each pixel up: by the second moments of its ink.

    Returns:
        −μxy / μyy, where y grows downwards.
    """
    ink = _grey(image)
    rows, columns = np.mgrid[: ink.shape[0], : ink.shape[1]]
    total = ink.sum()
    down, right = rows - (rows * ink).sum() / total, columns - (columns * ink).sum() / total
    found = -float((ink * down * right).sum() / (ink * down * down).sum())
    return 0.0 if math.isnan(found) else found


def _grey(image: object) -> np.ndarray:
    pixels = np.asarray(image)
    grey = pixels.astype(np.float64) / (255.0 if pixels.dtype == np.uint8 else 1.0)
    return grey.mean(axis=-1) if grey.ndim == 3 else grey
