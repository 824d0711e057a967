"""What quantization costs the digits pipeline: score, PSNR and SSIM against eager, bytes on disk, seconds an image.

    python benchmarks/quantization.py [--count 100]

Every bundle is compiled (with engines where the type allows it) and drawn with in this process, on this CPU. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from images import draw, psnr, ssim
from measuring import DIGITS, machine, median, table

sys.path.insert(0, str(DIGITS))

#: name → options of quantize, or of layerwise_cast; whether the type is compiled.
TYPES: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "float32": (None, True),
    "float32, not compiled": (None, False),
    "torchao int8_weight_only": ({"type": "int8_weight_only"}, True),
    "torchao int8_dynamic": ({"type": "int8_dynamic"}, True),
    "torchao int4_weight_only, groups of 32": ({"type": "int4_weight_only", "group_size": 32}, True),
    "torchao float8_weight_only": ({"type": "float8_weight_only"}, True),
    "torchao float8_dynamic, per row": ({"type": "float8_dynamic"}, False),
    "torchao float8_dynamic, per tensor": ({"type": "float8_dynamic", "granularity": "per_tensor"}, False),
    "quanto int8": ({"backend": "quanto", "type": "int8"}, True),
    "bitsandbytes int8": ({"backend": "bitsandbytes", "type": "int8"}, False),
    "bitsandbytes nf4": ({"backend": "bitsandbytes", "type": "nf4"}, False),
    "bitsandbytes nf4, double": ({"backend": "bitsandbytes", "type": "nf4", "double_quant": True}, False),
    "bitsandbytes fp4": ({"backend": "bitsandbytes", "type": "fp4"}, False),
    "layerwise_cast float8": ({"name": "layerwise_cast"}, True),
}


def spec(options: dict[str, Any] | None, compiled: bool) -> dict[str, Any]:
    """The example's spec with this quantization, all weights resident."""
    made = json.loads((DIGITS / "spec.json").read_text())
    passes = [{"name": "fuse_qkv", "component": "transformer"}]
    passes += [{"name": "quantize", "component": "transformer", **options}] if options else []
    passes += [{"name": "compile", "component": "transformer"}] if compiled else []
    return {**made, "passes": passes, "runtime": {}}


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
    score = f"{classifier.score(eager, digits):.2f}"
    rows: list[tuple[Any, ...]] = [("eager diffusers, float32", "", score, "", "", "", f"{median(seconds) * 1e3:.0f}")]
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, (kind, compiled)) in enumerate(TYPES.items()):
            built = diffkiln.compile(spec(kind, compiled), Path(folder) / str(index), base=DIGITS)
            with diffkiln.load(built.path) as pipe:
                size = sum(row.bytes for row in pipe.bundle.manifest.weights["transformer"])
                pipe(wanted[0].prompt)
                images, seconds = draw(pipe, wanted)
            row = (
                "yes" if compiled else "no",
                f"{classifier.score(images, digits):.2f}",
                f"{psnr(images, eager):.1f}",
                f"{ssim(images, eager):.4f}",
                f"{size / 1e6:.3f}",
                f"{median(seconds) * 1e3:.0f}",
            )
            rows.append((name, *row))
            print(rows[-1], file=sys.stderr, flush=True)
    print("# Quantization of the digits pipeline\n")
    print(described + "\n")
    print(
        f"{options.count} digits, 8 steps, QKV fused, all weights resident. The transformer is quantized, its norms' "
        "projections too. PSNR and SSIM against eager. The model is tiny: its layers are 96 wide, so scales weigh more "
        "and unpacking costs more than in real models.\n"
    )
    columns = ("pipeline", "compiled", "score", "PSNR, dB", "SSIM", "transformer, MB", "ms an image")
    print(table(columns, rows))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
