"""Process start to first image, for a bundle and for what it replaces, each in a fresh process with empty caches.

    python benchmarks/cold_start.py [--runs 5] [--compile-runs 3]

The clock is this process's: from starting the child to the line that it prints when the image's bytes are there. Ways
are interleaved, forwards and backwards in turn. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import DIGITS, machine, median, spread, table

CALL = "height=32, width=32, num_inference_steps=8, guidance_scale=1.0, max_sequence_length=16"
_DRAW = """
image = pipe("a handwritten seven", generator=torch.Generator("cpu").manual_seed(7), {call}).images[0]
print("image", len(image.tobytes()), flush=True)
"""
_EAGER = f"""
import torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained({str(DIGITS / "model")!r}, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
"""
WAYS = {
    "bundle": "import torch, diffkiln\npipe = diffkiln.load({bundle!r})\n",
    "bundle, as_diffusers": "import torch, diffkiln\npipe = diffkiln.load({bundle!r}, as_diffusers=True)\n",
    "eager diffusers": _EAGER,
    "compile_repeated_blocks": _EAGER + "pipe.transformer.compile_repeated_blocks(fullgraph=True)\n",
}


def start(way: str, bundle: Path) -> float:
    """Seconds from starting a process to its first image."""
    code = WAYS[way].replace("{bundle!r}", repr(str(bundle))) + _DRAW.replace("{call}", CALL)
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), caches)
        if way.startswith("bundle"):
            environment["PATH"] = "/no-programs"
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - started
        if child.wait() or not line.startswith("image"):
            raise SystemExit(f"{way}: the process failed")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile-runs", type=int, default=3, help="of compile_repeated_blocks, which takes long")
    options = parser.parse_args()
    described = machine()

    import diffkiln

    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        bundle = diffkiln.compile(DIGITS / "spec.json", Path(folder) / "bundle").path
        for way in list(WAYS)[:3]:
            start(way, bundle)  # the files into the page cache
        for index in range(options.segments):
            for way in list(WAYS)[:: 1 if index % 2 == 0 else -1]:
                if way != "compile_repeated_blocks" or index < options.compile_runs:
                    seconds[way].append(start(way, bundle))

    eager, compiled = median(seconds["eager diffusers"]), median(seconds["compile_repeated_blocks"])
    rows = [
        (
            way,
            f"{median(values):.2f} s",
            spread(values),
            len(values),
            f"{median(values) / eager:.2f}",
            f"{compiled / median(values):.1f}",
        )
        for way, values in seconds.items()
    ]
    print("# Cold start: process start to first image\n")
    print(described + "\n")
    print("examples/digits, float32, group offload, warm page cache, empty compiler caches.")
    print("No compiler is on the PATH of the bundle's processes.\n")
    print(table(("way", "median", "spread, s", "runs", "× eager", "times faster than compiling"), rows))
    print(
        "\nGoals: bundle ≤ 0.5 × eager and ≥ 8 times faster than compiling; as_diffusers ≤ 1.15 × eager and ≥ 4 times."
    )


if __name__ == "__main__":
    main()
