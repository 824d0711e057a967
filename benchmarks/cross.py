"""What building engines for GPUs that are not there takes, and what comes out.

    python benchmarks/cross.py [--small-only]

Needs a CUDA build of torch and no GPU (`make test-cross` makes such an environment). Each engine is built anew; what
engines share is made first, once for each kind of host. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tempfile

from measuring import machine, table

from diffkiln.exporters.aot_inductor import AotInductor
from diffkiln.exporters.base import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.cubins import cubins_of
from diffkiln.program import Program
from diffkiln.spec import TARGETS
from tests.cross import blocks


def cases(small_only: bool) -> Iterator[tuple[str, Program, str]]:
    for name in blocks.SMALL:
        for target in blocks.TARGETS.values():
            yield f"{name}, small", blocks.small(name), target
    if not small_only:
        for name, region in blocks.flux_dev().items():
            for sm in ("sm_89", "sm_90a"):
                yield f"FLUX.1-dev, {name}", region, blocks.TARGETS[sm]


def row(what: str, region: Program, target: str, cache: EngineCache) -> list[str]:
    cpu, wall = time.process_time() + sum(os.times()[2:4]), time.perf_counter()
    artefact = AotInductor().export(Lowering(region, TARGETS[target]), cache)
    wall, cpu = time.perf_counter() - wall, time.process_time() + sum(os.times()[2:4]) - cpu
    (library,) = artefact.directory.rglob("engine.so")
    cubins = cubins_of(library)
    kinds = ", ".join(sorted({cubin.sm for cubin in cubins}))
    return [what, kinds, str(len(cubins)), f"{wall:.0f}", f"{cpu:.0f}", f"{library.stat().st_size:,}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small-only", action="store_true")
    parser.add_argument("--cache", type=Path, help="keep the engines here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = EngineCache(given.cache or Path(scratch))
        AotInductor().prepare(TARGETS["nvidia-l4"], cache)
        rows = []
        for case in cases(given.small_only):
            rows.append(row(*case, cache))
            print(rows[-1], file=sys.stderr, flush=True)
    print("# Engines for GPUs that are not there\n")
    print(machine(), end="\n\n")
    print(table(["block", "code for", "kernels", "seconds", "of the CPU", "bytes"], rows))


if __name__ == "__main__":
    main()
