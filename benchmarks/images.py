"""What the benchmarks of quality share: drawing, and how far images are from others."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch


def draw(pipe: Any, wanted: Any, **call: Any) -> tuple[np.ndarray, list[float]]:
    """Images [n, height, width, 3] from 0 to 1, and the seconds that each took."""
    images, seconds = [], []
    for request in wanted:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        started = time.perf_counter()
        images.append(pipe(request.prompt, generator=generator, output_type="np", **call).images)
        seconds.append(time.perf_counter() - started)
    return np.concatenate(images), seconds


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of values from 0 to 1; over all images at once."""
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) with uniform 8 × 8 windows, mean over images, channels and windows."""
    x, y = (torch.from_numpy(each).permute(0, 3, 1, 2).double() for each in (a, b))

    def mean(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(value, 8, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(value.mean())
