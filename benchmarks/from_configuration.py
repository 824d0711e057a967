"""Engines of a full-size model from its configuration alone: memory, seconds and bytes; no weight is read or drawn.

    python benchmarks/from_configuration.py [--dtype bfloat16] [--height 1024 --width 1024]

It takes the compiler's own steps up to the engines, which are the same for a model with weights: those come afterwards,
a few blocks at a time (benchmarks/footprint.py). Prints Markdown.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import machine, table

from diffkiln import compiler
from diffkiln.bundle import BundleWriter
from diffkiln.exporters.cache import EngineCache
from diffkiln.packing import Packed, pack_engines
from diffkiln.passes import manager
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record
from diffkiln.record.quiet import quiet_libraries


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


class Watch:
    """Seconds of each step, and the most memory of this process and its children together while it ran."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self._peak = 0

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        ended = threading.Event()
        self._peak = 0
        sampler = threading.Thread(target=self._sample, args=(ended,), daemon=True)
        sampler.start()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        ended.set()
        sampler.join()
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.rows.append((step, f"{seconds:.1f} s", f"{own / 1e9:.2f} GB", f"{self._peak / 1e9:.2f} GB"))

    def _sample(self, ended: threading.Event) -> None:
        while not ended.wait(0.2):
            self._peak = max(self._peak, sum(map(_resident, _family())))


def _family() -> list[int]:
    """This process and all that descend from it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    own = {int(Path("/proc/self").resolve().name)}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sorted(own)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


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
            checked = compiler.check(spec(options))
        with watch("record"), quiet_libraries():
            recording = record(checked.pipe, checked.requests, Constants())
            manager.check_recording(recording, checked.placed, checked.targets)
            recording, _ = manager.rewrite(recording, checked.placed)
        packed = Packed(recording, None, [], ghosts=checked.plan.modules)
        (request,) = checked.plan.compile
        with watch("compile the blocks, and try each engine on random weights"):
            pack_engines(writer, packed, request, checked.targets, EngineCache(Path(folder) / "cache"))
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
