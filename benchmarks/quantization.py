"""What quantization costs the digits pipeline: score, PSNR and SSIM against eager, bytes on disk, seconds an image.

    python benchmarks/quantization.py [--count 100]

Every bundle is compiled with engines and group offload, and drawn with in this process. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import DIGITS, machine, median, table

sys.path.insert(0, str(DIGITS))

TYPES = (None, "int8_weight_only", "int8_dynamic", "float8_weight_only")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    described = machine()

    import classifier
    import evaluate_eager

    import diffkiln

    wanted = classifier.requests(options.count)
    digits = [request.digit for request in wanted]
    eager, seconds = draw(evaluate_eager.load(), wanted, **evaluate_eager.CALL)
    rows: list[tuple[Any, ...]] = [
        (
            "eager diffusers, float32",
            f"{classifier.score(eager, digits):.2f}",
            "",
            "",
            "",
            f"{median(seconds) * 1e3:.0f}",
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            spec = json.loads((DIGITS / ("spec-int8.json" if kind else "spec.json")).read_text())
            if kind:
                spec["passes"][1]["type"] = kind
            built = diffkiln.compile(spec, Path(folder) / (kind or "float32"), base=DIGITS)
            with diffkiln.load(built.path) as pipe:
                size = sum(row.bytes for row in pipe.bundle.manifest.weights["transformer"])
                images, seconds = draw(pipe, wanted)
            row = (
                f"{classifier.score(images, digits):.2f}",
                f"{psnr(images, eager):.1f}",
                f"{ssim(images, eager):.4f}",
            )
            rows.append((f"bundle, {kind or 'float32'}", *row, f"{size / 1e6:.2f}", f"{median(seconds) * 1e3:.0f}"))
    print("# Quantization of the digits pipeline\n")
    print(described + "\n")
    print(f"{options.count} digits, 8 steps, compiled blocks, groups offloaded to disk; PSNR and SSIM against eager.\n")
    columns = ("pipeline", "score", "PSNR, dB", "SSIM", "transformer, MB", "ms an image")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
