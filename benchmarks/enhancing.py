"""What a small network behind the decoder mends of what 4 bits and skipped steps lose on the digits pipeline.

    python benchmarks/enhancing.py [--count 100]

The network is trained here, on pictures of the compressed bundle and of the original with the same seeds. The prompts
are those of the classifier, with seeds below 1000; the pictures that are compared have seeds from 1000 on. Every bundle
is compiled and drawn with in this process, on this CPU. Prints a Markdown page.
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
from images import draw, psnr, ssim
from measuring import DIGITS, machine, median, spread, table
from safetensors.torch import save_file

sys.path.insert(0, str(DIGITS))

INT4 = {"name": "quantize", "component": "transformer", "type": "int4_weight_only", "group_size": 32}
MASK = {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 1, 1, 1, 0, 1, 0, 1]}
ENHANCE = {"name": "enhance", "component": "cleaner", "file": "cleaner.safetensors"}
#: name → the passes that lose.
WAYS: dict[str, list[dict[str, Any]]] = {"int4": [INT4], "int4, 6 of 8 steps": [INT4, MASK]}
PICTURES, BATCH, UPDATES, WIDTH, CONVOLUTIONS = 360, 40, 1500, 24, 4


def spec(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """The example's spec with these passes and no engines, all weights resident."""
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    return {**made, "passes": passes, "runtime": {}}


def trained(given: np.ndarray, wanted: np.ndarray, file: Path) -> tuple[int, float]:
    """Trains the network, writes its file, and returns the file's size and the seconds that it took."""
    from diffkiln.models.upscalers.srvgg import SRVGGNetCompact

    started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = SRVGGNetCompact(WIDTH, CONVOLUTIONS, 1).train()
    with torch.no_grad():
        network.body[-1].weight.zero_(), network.body[-1].bias.zero_()  # the picture itself, to begin with
    inputs, targets = (torch.from_numpy(each).permute(0, 3, 1, 2).contiguous() for each in (given, wanted))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        rows = torch.randint(0, len(inputs), (BATCH,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    save_file(network.state_dict(), file)
    return file.stat().st_size, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    described = machine()

    import classifier
    import evaluate_eager

    import diffkiln

    wanted, drawn_for = classifier.requests(options.count), classifier.requests(PICTURES, first_seed=0)
    digits = [request.digit for request in wanted]
    original = evaluate_eager.load()
    eager, _ = draw(original, wanted, **evaluate_eager.CALL)
    targets, _ = draw(original, drawn_for, **evaluate_eager.CALL)
    rows: list[tuple[str, ...]] = [("eager, float32", f"{classifier.score(eager, digits):.2f}", *[""] * 6)]
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, passes) in enumerate(WAYS.items()):
            base = Path(folder) / str(index)
            base.mkdir()
            told: tuple[str, str] = ("", "")
            for enhanced in (False, True):
                listed = [ENHANCE, *passes] if enhanced else passes
                built = diffkiln.compile(spec(listed), base / f"bundle-{enhanced}", base=base)
                with diffkiln.load(built.path) as pipe:
                    images, seconds = draw(pipe, wanted)
                    if not enhanced:
                        given, _ = draw(pipe, drawn_for)
                        size, taken = trained(given, targets, base / ENHANCE["file"])
                value, each = psnr(images, eager), [second * 1e3 for second in seconds]
                told = (f"{size / 1e3:.0f}", f"{taken:.0f}") if enhanced else ("", "")
                row = (
                    f"{name}, enhanced" if enhanced else name,
                    f"{classifier.score(images, digits):.2f}",
                    f"{value:.1f}",
                    f"{ssim(images, eager):.4f}",
                    f"{10 ** (-value / 20) * 255:.2f}",
                    f"{median(each):.0f} ({spread(each)})",
                    *told,
                )
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    print("# A network behind the decoder\n")
    print(described + "\n")
    print(
        f"{options.count} digits, 8 steps, no engines. PSNR and SSIM against eager; the error is the root of the mean "
        f"square, in levels of 255. The network is Real-ESRGAN's compact one without enlargement, {WIDTH} channels and "
        f"{CONVOLUTIONS + 2} convolutions, trained on {PICTURES} pairs of pictures ({UPDATES} updates of {BATCH}) with "
        "other seeds than those compared here, and added by `enhance`.\n"
    )
    print(table(("pipeline", "score", "PSNR, dB", "SSIM", "error", "ms an image", "KB added", "training, s"), rows))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
