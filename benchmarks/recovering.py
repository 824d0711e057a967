"""What `recover` regains of what 4 bits lose on the digits pipeline: score, PSNR and SSIM against eager, bytes, time.

    python benchmarks/recovering.py [--count 100]

The prompts of the training are those of the classifier, with seeds below 1000; the pictures that are compared have
seeds from 1000 on. Every bundle is compiled and drawn with in this process, on this CPU. Prints a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from images import draw, psnr, ssim
from measuring import DIGITS, machine, median, spread, table

sys.path.insert(0, str(DIGITS))

INT8 = {"type": "int8_weight_only"}
INT4 = {"type": "int4_weight_only", "group_size": 32}
NF4 = {"backend": "bitsandbytes", "type": "nf4"}
#: The training of all rows: 480 pictures, 40 at a time.
TRAINING = {"pictures": 480, "batch": 40, "updates": 1000, "learning_rate": 2e-3}
#: The best approximation of what was lost, which the training begins with.
UNTRAINED = {"rank": 8, "pictures": 1, "updates": 1, "learning_rate": 1e-12}
#: name → options of quantize; those of recover, if it is there; whether the transformer is compiled.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "int8": (INT8, None, False),
    "int4, groups of 32": (INT4, None, True),
    "int4, factors of rank 8, untrained": (INT4, UNTRAINED, False),
    "int4 recovered, rank 4": (INT4, {"rank": 4}, False),
    "int4 recovered, rank 8": (INT4, {"rank": 8}, True),
    "nf4": (NF4, None, False),
    "nf4 recovered, rank 8": (NF4, {"rank": 8}, False),
}
#: PSNR of a picture and itself with 8 bits a channel, in which errors of rounding are uniform.
CEILING = 58.9


def spec(kind: dict[str, Any], training: dict[str, Any] | None, compiled: bool) -> dict[str, Any]:
    """The example's spec with this quantization, all weights resident."""
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    passes = [{"name": "fuse_qkv"}, {"name": "quantize", **kind}]
    passes += [{"name": "recover", "prompts": "prompts.txt", **TRAINING, **training}] if training else []
    passes += [{"name": "compile"}] if compiled else []
    return {**made, "passes": [{"component": "transformer", **each} for each in passes], "runtime": {}}


def regained(value: float, lost: float) -> str:
    """The share of what was lost, up to the ceiling, that is there again."""
    return f"{(value - lost) / (CEILING - lost):.0%}"


def speed(count: int) -> str:
    """A table of the time of an image with engines, without factors and with some, drawn in turn."""
    import classifier

    import diffkiln

    wanted = classifier.requests(count)
    seconds: dict[str, list[float]] = {"int4": [], "int4, factors of rank 8": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (Path(folder) / "prompts.txt").write_text(wanted[0].prompt)
        pipes = []
        for index, training in enumerate((None, UNTRAINED)):
            built = diffkiln.compile(spec(INT4, training, True), Path(folder) / str(index), base=folder)
            pipes.append(stack.enter_context(diffkiln.load(built.path)))
        for request in [wanted[0], *wanted]:
            for found, pipe in zip(seconds.values(), pipes, strict=True):
                found += draw(pipe, [request])[1]
    counted = {name: [each * 1e3 for each in found[1:]] for name, found in seconds.items()}
    rows = [(name, f"{median(found):.0f}", spread(found)) for name, found in counted.items()]
    return table(("compiled transformer", "ms an image, median", "lowest to highest"), rows)


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
    eager, _ = draw(evaluate_eager.load(), wanted, **evaluate_eager.CALL)
    rows: list[tuple[str, ...]] = [("eager, float32", "", f"{classifier.score(eager, digits):.2f}", *[""] * 6)]
    lost = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFKILN_CACHE_DIR"] = f"{folder}/cache"  # so that everything is trained here
        texts = [prompt for digit in range(10) for prompt in classifier.prompts(digit)]
        (Path(folder) / "prompts.txt").write_text("\n".join(texts))
        for index, (name, (kind, training, compiled)) in enumerate(WAYS.items()):
            built = diffkiln.compile(spec(kind, training, compiled), Path(folder) / str(index), base=folder)
            with diffkiln.load(built.path) as pipe:
                size = sum(row.bytes for row in pipe.bundle.manifest.weights["transformer"])
                images, _ = draw(pipe, wanted)
            value = psnr(images, eager)
            lost = lost if training else value
            taken = built.seconds.get("recover transformer")
            row = (
                "yes" if compiled else "no",
                f"{classifier.score(images, digits):.2f}",
                f"{value:.1f}",
                regained(value, lost) if training else "",
                f"{ssim(images, eager):.4f}",
                f"{10 ** (-value / 20) * 255:.2f}",
                f"{size / 1e6:.3f}",
                f"{taken:.0f}" if taken is not None else "",
            )
            rows.append((name, *row))
            print(rows[-1], file=sys.stderr, flush=True)
    print("# Recovering what 4 bits lose\n")
    print(described + "\n")
    print(
        f"{options.count} digits, 8 steps, QKV fused, all weights resident. PSNR and SSIM against eager; the error is "
        "the root of the mean square, in levels of 255. The original drew 480 pictures of the classifier's 60 prompts "
        "for the training, with other seeds than those compared here. A picture and itself have no finite PSNR, so "
        f"what is regained is a share of the way from int4 (or nf4) to {CEILING} dB, which is what saving a picture "
        "with 8 bits a channel leaves of it. Training takes 1000 updates, each of one step of 40 pictures; its time "
        "includes the original's drawing.\n"
    )
    columns = ("transformer", "compiled", "score", "PSNR, dB", "regained", "SSIM", "error", "MB", "training, s")
    print(table(columns, rows))
    print(
        "\nThe layers are 96 wide, so factors of rank 8 have 17 % as many numbers as a weight of 96 × 96; of one of "
        "3072 × 3072 they have 0.5 %.\n"
    )
    print(f"Drawn in turn, {options.count} digits each:\n")
    print(speed(options.count))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
