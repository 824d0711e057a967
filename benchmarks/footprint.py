"""What diffkiln itself takes: import time, checking and recording a full-size model, memory of a compile, bytes stored.

    python benchmarks/footprint.py [--without-compile]

Each row is measured in a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import DIGITS, machine, median, spread, table

FLUX = {
    "spec_version": 1,
    "source": {"architecture": "flux.1-dev", "seed": 0},
    "target": {"device": "cpu"},
    "inputs": {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5},
    "passes": [{"name": "fuse_qkv", "component": "transformer"}, {"name": "compile", "component": "transformer"}],
}
SD = {
    "spec_version": 1,
    "source": {"architecture": "sd-1.5", "seed": 0, "dtype": "float32"},
    "target": {"device": "cpu"},
    "inputs": {"height": 256, "width": 256, "num_inference_steps": 20, "guidance_scale": 7.5},
    "passes": [{"name": "fuse_qkv", "component": "unet"}],
}
_MEASURE = """
import json, resource, sys, time
spec, output = json.loads(sys.argv[1]), sys.argv[2]
import diffusers, torch, torchao, transformers
from transformers import CLIPTextModel, T5EncoderModel
getattr(diffusers, sys.argv[3])
import diffkiln.compiler as compiler
from diffkiln.record.pipeline import record
from diffkiln.record.quiet import quiet_libraries
from diffkiln.record.tape import Constants
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
imported = peak()
started = time.perf_counter()
if output:
    built = compiler.compile(spec, output)
    told = {"seconds": time.perf_counter() - started, "steps": dict(built.seconds)}
else:
    checked = compiler.check(spec)
    told = {"check": time.perf_counter() - started, "after_check": peak()}
    started = time.perf_counter()
    with quiet_libraries():
        record(checked.pipe, checked.requests, Constants())
    told["record"] = time.perf_counter() - started
print(json.dumps(told | {"imported": imported, "peak": peak()}))
"""


def measured(spec: dict[str, Any], pipeline: str, output: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURE, json.dumps(spec), str(output or ""), pipeline]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def seconds(*command: str, runs: int = 7) -> list[float]:
    values = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        values.append(time.perf_counter() - started)
    return values


def compile_rows(folder: Path) -> list[tuple[str, str, str]]:
    told = measured(SD, "StableDiffusionPipeline", folder / "sd")
    manifest = json.loads((folder / "sd" / "manifest.json").read_text())
    sizes = {name: sum(row["bytes"] for row in rows) for name, rows in manifest["weights"].items()}
    files = sum(row["size"] for row in manifest["files"] if row["role"] == "weights")
    largest, total = max(sizes.values()), sum(sizes.values())
    return [
        (
            f"peak memory of compiling SD 1.5, float32 (largest component {largest / 1e9:.2f} GB of {total / 1e9:.2f})",
            f"{told['peak'] / 1e9:.2f} GB = {told['peak'] / largest:.2f} × the largest; without the "
            f"{told['imported'] / 1e9:.2f} GB of imports {(told['peak'] - told['imported']) / largest:.2f} ×",
            "≤ 1.3 ×",
        ),
        ("weights in that bundle against the transformed weights", f"{files / total:.4f} ×", "≤ 1.01 ×"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-compile", action="store_true", help="leave out the compile of SD 1.5")
    options = parser.parse_args()
    print("# Footprint\n")
    print(machine() + "\n")

    bare, imported = seconds("-c", "pass"), seconds("-c", "import diffkiln")
    shown = seconds("-m", "diffkiln", "--help")
    flux = [measured(FLUX, "FluxPipeline") for _ in range(3)]
    digits = json.loads((DIGITS / "spec.json").read_text())
    digits["source"]["model"] = str(DIGITS / "model")
    small = [measured(digits, "FluxPipeline") for _ in range(3)]
    check, record = [told["check"] for told in flux], [told["record"] for told in flux]
    rows: list[tuple[str, str, str]] = [
        ("`import diffkiln`, without Python's own start", f"{median(imported) - median(bare):.3f} s", "≤ 0.15 s"),
        ("`diffkiln --help`", f"{median(shown):.3f} s ({spread(shown)})", "≤ 0.5 s"),
        ("check of full-size FLUX.1-dev, after imports", f"{median(check):.2f} s ({spread(check)})", "≤ 2 s"),
        ("memory of that process, imports included", f"{max(t['after_check'] for t in flux) / 1e9:.2f} GB", "< 1 GB"),
        ("recording FLUX.1-dev, call and components, 28 steps", f"{median(record):.2f} s ({spread(record)})", "≤ 5 s"),
        ("memory after recording it", f"{max(told['peak'] for told in flux) / 1e9:.2f} GB", ""),
        ("recording the digits pipeline, 8 steps", f"{median([told['record'] for told in small]):.2f} s", "≤ 5 s"),
    ]
    if not options.without_compile:
        with tempfile.TemporaryDirectory() as folder:
            rows += compile_rows(Path(folder))
    print(table(("what", "measured", "goal"), rows))


if __name__ == "__main__":
    main()
