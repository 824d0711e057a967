"""On one NVIDIA GPU: a program's replay against eager diffusers, with weights resident and streamed.

    python benchmarks/gpu/replay.py [--architecture sd-1.5] [--dtype bfloat16] [--steps 20] [--runs 10]

Random weights of the true shapes: times and memory mean something, images do not. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import machine, median, spread, table

SIZES = {"sd-1.5": 512, "sdxl-base-1.0": 1024, "flux.1-dev": 1024, "sd3.5-medium": 1024, "pixart-sigma-1024": 1024}


def timed(pipe: Any, call: dict[str, Any], runs: int) -> tuple[list[float], int]:
    """Seconds of each run after three that do not count, and the peak of allocated memory in bytes."""
    seconds = []
    for index in range(runs + 3):
        if index == 3:
            torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator("cpu").manual_seed(index)
        torch.cuda.synchronize()
        started = time.perf_counter()
        pipe(prompt="a red fox in the snow", generator=generator, output_type="pt", **call)
        torch.cuda.synchronize()
        if index >= 3:
            seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=SIZES, default="sd-1.5")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()

    import diffkiln

    side = SIZES[options.architecture]
    call = {"height": side, "width": side, "num_inference_steps": options.steps, "guidance_scale": 5.0}
    spec: dict[str, Any] = {
        "spec_version": 1,
        "source": {"architecture": options.architecture, "seed": 0, "dtype": options.dtype},
        "target": {"device": "cuda", "gpu": "nvidia-h200"},
        "inputs": call,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, offload in (("resident", None), ("streamed from host", "host"), ("streamed from disk", "disk")):
            runtime = {"offload": {"num_blocks_per_group": 1, "to": offload}} if offload else {}
            built = diffkiln.compile(spec | {"runtime": runtime}, Path(folder) / name.replace(" ", "-"))
            with diffkiln.load(built.path) as pipe:
                rows.append((f"bundle, {name}", *timed(pipe, call, options.runs)))
            if offload is None:
                pipe = diffkiln.load(built.path, as_diffusers=True)
                pipe.set_progress_bar_config(disable=True)
                rows.insert(0, ("eager diffusers", *timed(pipe, call, options.runs)))
                del pipe
                torch.cuda.empty_cache()
    eager = median(rows[0][1])
    what = f"{options.architecture}, {options.dtype}, {side}², {options.steps} steps"
    print(f"# Replay on {torch.cuda.get_device_name()}: {what}\n")
    print(f"{machine()}; CUDA {torch.version.cuda}\n")
    shown = [
        (way, f"{median(values):.3f} s", spread(values), f"{median(values) / eager:.2f}", f"{peak / 1e9:.2f} GB")
        for way, values, peak in rows
    ]
    print(table(("way", "median", "spread, s", "× eager", "peak allocated"), shown))


if __name__ == "__main__":
    main()
