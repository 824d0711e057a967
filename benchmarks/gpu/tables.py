"""The Markdown of what `run.sh` measured, in one call or several: rows that are not there are "not measured".

python benchmarks/gpu/tables.py --rows DIR [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import machine, median, spread, table

#: Ways in the table's order; what each is, in words.
WAYS = {
    "eager": "diffusers, eager",
    "eager-cudnn": "diffusers, eager, cuDNN attention",
    "compile-blocks": "torch.compile, regional",
    "compile-full": "torch.compile, full",
    "pruna-like": "QKV fusion + FORA every 2nd + torch.compile",
    "bundle-bf16": "bundle, bf16",
    "bundle-bf16-untuned": "bundle, bf16, engines built with the GPU hidden",
    "bundle-bf16-hoisted": "bundle, bf16, conditioning hoisted",
    "bundle-bf16-step-graphs": "bundle, bf16, CUDA graphs over steps",
    "bundle-bf16-program-graphs": "bundle, bf16, CUDA graphs over the program",
    "bundle-fp8": "bundle, fp8",
    "bundle-fp8-mask": "bundle, fp8, 14 of 28 steps computed",
    "bundle-fp8-streamed": "bundle, fp8, conditioning hoisted, weights streamed from the host",
    "offload-group": "diffusers, group offload",
    "offload-model": "diffusers, model offload",
    "offload-sequential": "diffusers, sequential offload",
}
#: What a row knows of memory, in the table's order.
MEMORY = ("predicted", "allocated", "reserved", "driver")
_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,power.limit"


def gpu() -> str:
    """Name, driver and clocks as nvidia-smi says them, and the versions that decide kernels."""
    try:
        import torch
        import triton  # pyright: ignore[reportMissingImports]

        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, triton {triton.__version__}"
    except ImportError as error:
        versions = f"{error.name} is not installed"
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found = f"nvidia-smi did not answer ({type(error).__name__})"
    return f"{_QUERY.replace(',', ', ')}: {found}; {versions}"


def shown(way: str, row: Mapping[str, Any] | None, eager: float | None) -> list[str]:
    """One line of the table."""
    if row is None:
        return [WAYS[way], "not measured", *[""] * 9]
    seconds = row["seconds"]
    told = f"failed: {row['failed']}" if "failed" in row else "not measured"
    memory = row.get("memory", {})
    return [
        WAYS[way],
        f"{median(seconds):.3f}" if seconds else told,
        f"{spread(seconds)} ({len(seconds)})" if seconds else "",
        f"{median(seconds) / eager:.2f}" if seconds and eager else "",
        f"{row['loaded']:.0f}" if "loaded" in row else "",
        f"{row['first_image']:.0f}" if "first_image" in row else "",
        *(f"{memory[name] / 1e9:.2f}" if name in memory else "" for name in MEMORY),
        f"{row['cosine']:.6f}, {row['relative_l2']:.1e}" if "cosine" in row else "",
    ]


def read(path: Path) -> Any:
    """A row, or None where there is none, or one that was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def lines(rows: Path, note: str) -> Sequence[str]:
    found = {way: read(rows / f"{way}.json") for way in WAYS}
    counted = (found["eager"] or {}).get("seconds")
    eager = median(counted) if counted else None
    columns = (
        "way", "median, s", "spread (runs)", "× eager", "start → loaded, s", "start → first image, s",
        "predicted, GB", "allocated, GB", "reserved, GB", "GPU in use, GB", "latents: cosine, relative L2 to eager",
    )  # fmt: skip
    ceilings = read(rows / "ceilings.json")
    return [
        "# FLUX.1-dev of full size on one GPU",
        "",
        f"{gpu()}; {machine()}. {note}".strip(),
        "",
        "1024², 28 steps, 512 tokens of text, batch 1, bf16 unless a row says otherwise. Random weights of the true",
        "shapes: times and memory mean something, images do not, and neither do differences beyond a check for faults.",
        "Ways that were measured together took turns, A B B A. The start is that of the process, with empty caches of",
        "compilers; diffusers' rows draw their weights before they are loaded, and a bundle's row compiles the bundle",
        "where it was not there. Predicted is the planner's peak of weights, constants and results; GPU in use is the",
        "driver's number for all processes together.",
        "",
        table(columns, [shown(way, found[way], eager) for way in WAYS]),
        "",
        table(("ceiling", "measured"), list((ceilings or {"all": "not measured"}).items())),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    print("\n".join(lines(options.rows, options.note)))


if __name__ == "__main__":
    main()
