"""What passes for UNets and for guidance cost and bring on the digits UNet, by the classifier.

    python benchmarks/unet.py [--count 40]

Every bundle is replayed, without engines, on this CPU. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from images import draw, psnr, ssim
from measuring import DIGITS, machine, table

sys.path.insert(0, str(DIGITS))
EXAMPLE = DIGITS.parent / "digits_unet"
SEEDS = 4
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def deep(interval: int, depth: int = 1) -> dict[str, Any]:
    """A schedule of DeepCache."""
    options = {"method": "deepcache", "interval": interval, "depth": depth}
    return {"name": "cache_schedule", "component": "unet", **options}


def guided(*steps: int) -> dict[str, Any]:
    """Guidance in some of ten steps."""
    return {"name": "guidance", "component": "unet", "steps": list(steps)}


def merged(ratio: float) -> dict[str, Any]:
    """Merged tokens."""
    return {"name": "merge_tokens", "component": "unet", "ratio": ratio}


PASSES: dict[str, Sequence[dict[str, Any]]] = {
    "none": (),
    "DeepCache, interval 2": (deep(2),),
    "DeepCache, interval 2, depth 2": (deep(2, 2),),
    "DeepCache, interval 3": (deep(3),),
    "DeepCache, interval 5": (deep(5),),
    "tokens merged, 25 %": (merged(0.25),),
    "tokens merged, 50 %": (merged(0.5),),
    "tokens merged, 75 %": (merged(0.75),),
    "guidance in the first 5 steps": (guided(1, 1, 1, 1, 1, 0, 0, 0, 0, 0),),
    "guidance in the last 5 steps": (guided(0, 0, 0, 0, 0, 1, 1, 1, 1, 1),),
    "guidance in no step": (guided(*[0] * 10),),
    "guidance in two calls": ({"name": "guidance", "component": "unet", "batch": "halved"},),
    "DeepCache, interval 2, and guidance in the first 5 steps": (guided(1, 1, 1, 1, 1, 0, 0, 0, 0, 0), deep(2)),
}


def spec(passes: Sequence[dict[str, Any]] = (), pipeline: str | None = None, **call: Any) -> dict[str, Any]:
    """The example's spec with these passes and no engines, for this class of pipeline."""
    made = json.loads((EXAMPLE / "spec.json").read_text())
    made["source"] |= {"pipeline": pipeline} if pipeline else {}
    made["inputs"]["call"] |= call
    return made | {"passes": list(passes), "runtime": {}}


def quality(folder: Path, count: int) -> list[tuple[str, ...]]:
    """A row for each of `PASSES`: score, PSNR and SSIM against the bundle without passes."""
    import classifier

    import diffkiln

    wanted = classifier.requests(count)
    digits = [request.digit for request in wanted]
    rows: list[tuple[str, ...]] = []
    plain: np.ndarray | None = None
    for index, (name, passes) in enumerate(PASSES.items()):
        built = diffkiln.compile(spec(passes), folder / str(index), base=EXAMPLE)
        with diffkiln.load(built.path) as pipe:
            images, _ = draw(pipe, wanted)
        plain = images if plain is None else plain
        apart = (f"{psnr(images, plain):.1f}", f"{ssim(images, plain):.4f}")
        rows.append((name, f"{classifier.score(images, digits):.2f}", *apart))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def negative(pipe: Any) -> list[tuple[str, ...]]:
    """A row for each digit: pictures of the empty prompt read as it, without and with it as negative prompt."""
    import classifier

    class Empty:
        prompt = ""

        def __init__(self, seed: int) -> None:
            self.seed = seed

    empty = [Empty(seed) for seed in range(10 * SEEDS)]
    free = classifier.read(draw(pipe, empty)[0])
    rows = []
    for digit, word in enumerate(classifier.WORDS):
        without = classifier.read(draw(pipe, empty, negative_prompt=f"a handwritten {word}")[0])
        rows.append((word, str(int((free == digit).sum())), str(int((without == digit).sum()))))
    return rows


def strength(folder: Path, pipe: Any) -> list[tuple[str, ...]]:
    """A row for each strength: pictures of one digit that are asked to become the next one, and how they are read."""
    import classifier
    import torch
    from PIL import Image

    import diffkiln

    wanted = classifier.requests(10 * SEEDS // 2)
    drawn, _ = draw(pipe, wanted)
    pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in drawn]
    rows = []
    for value in STRENGTHS:
        made = spec(pipeline="StableDiffusionImg2ImgPipeline", strength=value, image={})
        built = diffkiln.compile(made, folder / f"strength-{value}", base=EXAMPLE)
        with diffkiln.load(built.path) as changing:
            images = [
                changing(
                    f"a handwritten {classifier.WORDS[(request.digit + 1) % 10]}",
                    image=picture,
                    generator=torch.Generator("cpu").manual_seed(request.seed),
                    output_type="np",
                ).images[0]
                for request, picture in zip(wanted, pictures, strict=True)
            ]
        digits = [request.digit for request in wanted]
        asked = classifier.score(images, [(digit + 1) % 10 for digit in digits])
        apart = psnr(np.stack(images), drawn)
        rows.append((f"{value:g}", f"{classifier.score(images, digits):.2f}", f"{asked:.2f}", f"{apart:.1f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    import torch

    import diffkiln

    torch.set_num_threads(1)  # operations this small gain little from a second thread, and lose much on a busy machine
    described = machine()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        passes = quality(folder, options.count)
        with diffkiln.load(folder / "0") as pipe:
            refused, changed = negative(pipe), strength(folder, pipe)
    print("# Passes for UNets and for guidance on the digits UNet\n")
    print(described + "\n")
    print(
        f"examples/digits_unet: {options.count} digits, 10 steps, guidance 3, replayed without engines, one image "
        "at a time. The score is the share that the classifier reads as what was asked for. PSNR and SSIM against the "
        "bundle without passes, which equals diffusers. No times: with 8 × 8 latents "
        "they say nothing of real models.\n"
    )
    print(table(("passes", "score", "PSNR, dB", "SSIM"), passes))
    print(f"\nNegative prompts: of {10 * SEEDS} pictures of the empty prompt, how many are read as the digit.\n")
    print(table(("digit", "no negative prompt", "the digit as negative prompt"), refused))
    print(
        f"\n`strength` of image to image: {10 * SEEDS // 2} pictures of a digit, each with the next digit as its "
        "prompt. PSNR against the picture that it starts from.\n"
    )
    print(table(("strength", "read as the picture's digit", "read as the prompt's digit", "PSNR, dB"), changed))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
