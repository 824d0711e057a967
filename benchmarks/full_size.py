"""A full-size FLUX.1-dev with random weights, for several targets at once: compiled, loaded, drawn where it can be.

    python benchmarks/full_size.py FOLDER [--targets NAME …] [--keep]

The pipeline has its true shapes, 33.7 GB in bfloat16, and FOLDER takes that much. Engines for GPUs need a torch built
with CUDA and no GPU (`make test-cross` makes such an environment). With a CPU among the targets a fresh process loads
the bundle, with its weights on the disk, and draws one small image in one step. Prints Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import Watch, machine, table

#: The size that the model is made for, and one that a CPU can draw.
SIZES = (
    {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5},
    {"height": 256, "width": 256, "num_inference_steps": 1, "guidance_scale": 3.5},
)
TARGETS = ("nvidia-rtx-4090", "nvidia-l4", "nvidia-h200", "cpu-x86-64-v3")


def spec(targets: list[str]) -> dict[str, Any]:
    on_cpu = any(name.startswith("cpu-") for name in targets)
    return {
        "spec_version": 1,
        "source": {"architecture": "flux.1-dev", "seed": 0, "dtype": "bfloat16"},
        "target": [
            {"device": "cpu", "isa": name.removeprefix("cpu-")}
            if name.startswith("cpu-")
            else {"device": "cuda", "gpu": name}
            for name in targets
        ],
        "inputs": list(SIZES) if on_cpu else SIZES[0],
        "passes": [{"name": "fuse_qkv", "component": "transformer"}, {"name": "compile", "component": "transformer"}],
        "runtime": {"offload": {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}},
    }


def build(targets: list[str], bundle: Path) -> None:
    import diffkiln

    began = machine()
    watch = Watch()
    diffkiln.compile(spec(targets), bundle, progress=watch.begin)
    watch.end()
    weights = _bytes(bundle / "weights")
    rest = _bytes(bundle) - weights
    print(f"# FLUX.1-dev of full size for {len(targets)} targets\n\n{began}\n")
    print(f"{', '.join(targets)}: {weights / 1e9:.2f} GB of weights, {rest / 1e6:.1f} MB of everything else.\n")
    print(table(("step", "seconds", "peak of the process so far", "peak with its compilers"), watch.rows), flush=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw(bundle: Path) -> None:
    """In a process of its own, so that its memory is the runtime's alone."""
    import torch

    import diffkiln

    watch = Watch()
    watch.begin("load")
    pipe = diffkiln.load(bundle)
    watch.begin("draw 256 × 256, one step")
    pipe("a small kiln", generator=torch.Generator("cpu").manual_seed(7), **SIZES[1])
    watch.end()
    store = pipe.executor.store
    print(f"\nIn a fresh process, on this CPU, {torch.get_num_threads()} threads:\n")
    print(table(("step", "seconds", "peak of the process so far", "peak with its children"), watch.rows))
    print(f"\nWeights in memory at once: {store.groups_peak} groups, {store.bytes_peak / 1e9:.2f} GB.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--keep", action="store_true", help="leave the bundle in the folder")
    parser.add_argument("--draw", action="store_true", help="draw with the bundle that is in the folder")
    given = parser.parse_args()
    bundle = given.folder / "bundle"
    if given.draw:
        draw(bundle)
        return
    build(given.targets, bundle)
    if any(name.startswith("cpu-") for name in given.targets):
        for _ in range(2):  # the first load compares all weights with their digests
            subprocess.run([sys.executable, __file__, str(given.folder), "--draw"], check=True)
    if not given.keep:
        shutil.rmtree(bundle)


if __name__ == "__main__":
    main()
