"""Engines of a full-size model from its configuration alone: memory, seconds and bytes; no weight is read or drawn.

    python benchmarks/from_configuration.py [--dtype bfloat16] [--height 1024 --width 1024]

It takes the compiler's own steps up to the engines, which are the same for a model with weights: those come afterwards,
a few blocks at a time (benchmarks/footprint.py). Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import Watch, machine, table

from diffkiln.bundle import BundleWriter
from diffkiln.compiler.check import check
from diffkiln.compiler.packing import EnginesPacker
from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record


def spec(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "spec_version": 1,
        "source": {"architecture": "flux.1-dev", "seed": 0, "dtype": options.dtype},
        "target": {"device": "cpu", "isa": "x86-64-v3"},
        "inputs": {
            "height": options.height,
            "width": options.width,
            "num_inference_steps": 28,
            "guidance_scale": 3.5,
        },
        "passes": [{"name": "fuse_qkv", "component": "transformer"}, {"name": "compile", "component": "transformer"}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    began = machine()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, BundleWriter(Path(folder) / "bundle") as writer:
        with watch("check"):
            checked = check(spec(options))
        with watch("record"), quiet_libraries():
            recording = record(checked.pipe, checked.requests, Constants())
            manager.check_recording(recording, checked.listed, checked.targets)
            recording, _ = manager.rewrite(recording, checked.listed)
        engines = EnginesPacker(writer, EngineCache(Path(folder) / "cache"), recording, checked.state.modules)
        (request,) = checked.state.compile
        with watch("compile the blocks, and try each engine on random weights"):
            packed = engines.component(request, checked.targets)
        files = {row.path: row.size for row in writer.rows}
    total = sum(checked.bytes_after.values())
    print("# From configuration\n")
    print(began + "\n")
    print(
        f"FLUX.1-dev, {options.height} × {options.width}, {options.dtype}, fused: {total / 1e9:.1f} GB of weights, "
        f"{checked.bytes_after['transformer'] / 1e9:.1f} of them the transformer's; none was read or drawn.\n"
    )
    print(table(("step", "seconds", "peak of the process so far", "peak with its compilers"), watch.rows))
    print()
    regions = recording.modules["transformer"].regions
    sizes = [
        (
            row.region,
            len(regions[row.region].weights),
            f"{sum(s for p, s in files.items() if p.startswith(row.path)):,}",
        )
        for row in packed.engines
    ]
    print(table(("engine", "weights that it takes", "bytes"), sizes))


if __name__ == "__main__":
    main()
