"""Draw 100 digits with the pipeline as diffusers runs it, before any compiling, and print the score.

    python examples/digits/evaluate_eager.py [--model DIR] [--count N] [--batch N] [--grid OUT.png]

Tests and benchmarks take `load`, `generate` and `CALL` from here, to compare a compiled pipeline with this one.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from classifier import Request, read, requests, score
from diffusers import FluxPipeline
from PIL import Image

MODEL = Path(__file__).parent / "model"
CALL = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 8,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}


def load(model: Path = MODEL) -> FluxPipeline:
    """The pipeline from a local folder, without network and without progress bars."""
    pipeline = FluxPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: FluxPipeline, wanted: Sequence[Request], batch: int = 1) -> list[Image.Image]:
    """One 32 × 32 RGB image a request, each from a CPU generator of its own, `batch` of them at a time.

    A request's image depends on neither `batch` nor the other requests, but for rounding.
    """
    images = []
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in part]
        images += pipeline([request.prompt for request in part], generator=generators, **CALL).images
    return images


def grid(images: Sequence[Image.Image], columns: int = 10, scale: int = 2) -> Image.Image:
    """The images side by side, row by row, enlarged without smoothing."""
    width, height = (scale * side for side in images[0].size)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (column * width, row * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=100, help="how many digits to draw")
    parser.add_argument("--batch", type=int, default=1, help="how many to draw at a time")
    parser.add_argument("--grid", type=Path, help="a PNG file to write the images to")
    options = parser.parse_args()

    torch.set_num_threads(1)  # the model is too small for more to pay, and on a busy machine they wait for each other
    pipeline, wanted = load(options.model), requests(options.count)
    started = time.monotonic()
    images = generate(pipeline, wanted, options.batch)
    seconds = time.monotonic() - started
    for request, seen in zip(wanted, read(images), strict=True):
        if seen != request.digit:
            print(f"{request.prompt!r}, seed {request.seed}: read as {seen}")
    print(f"score {score(images, [request.digit for request in wanted]):.2f}")
    print(f"{seconds:.1f} s for {len(images)} images, {options.batch} at a time")
    if options.grid:
        grid(images).save(options.grid)


if __name__ == "__main__":
    main()
