"""What building engines for GPUs that are not there takes, and what comes out.

    python benchmarks/cross.py [--small-only | --parts-only]

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

from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.aot_inductor.cubins import cubins_of
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.program import Program
from diffkiln.program.sizes import Family
from diffkiln.spec import TARGETS
from tests.cross import blocks, parts
from tests.exporters.regions import total

#: What is built, of which regions, and for which target.
Case = tuple[str, Family, str]


def cases(given: argparse.Namespace) -> Iterator[Case]:
    if not given.parts_only:
        yield from of_blocks(given.small_only)
    if not given.small_only:
        yield from of_parts()


def of_blocks(small_only: bool) -> Iterator[Case]:
    for name in blocks.SMALL:
        for target in blocks.TARGETS.values():
            yield f"{name}, small", alone(blocks.small(name)), target
    if not small_only:
        for name, region in blocks.flux_dev().items():
            for sm in ("sm_89", "sm_90a"):
                yield f"FLUX.1-dev, {name}", alone(region), blocks.TARGETS[sm]


def of_parts() -> Iterator[Case]:
    for name in parts.PARTS:
        yield f"Flux, small, {name}", alone(parts.part(name)), "nvidia-l4"
    for kind in parts.QUANTIZED:
        yield f"Flux, small, in {kind}", alone(parts.quantized(kind)), "nvidia-l4"
    for component, what in (
        ("transformer", "for three sizes"),
        ("vae", "VAE decoder for four"),
        ("scheduler", "scheduler for three"),
    ):
        yield f"Flux, small, {what}", parts.ranged(component), "nvidia-l4"


def alone(region: Program) -> Family:
    return Family((region,), {}, {})


def row(what: str, family: Family, target: str, cache: EngineCache) -> list[str]:
    cpu, wall = time.process_time() + sum(os.times()[2:4]), time.perf_counter()
    lowering = Lowering(family.members[0], TARGETS[target], family=family if family.ranges else None)
    artefact = AotInductor().export(lowering, cache)
    wall, cpu = time.perf_counter() - wall, time.process_time() + sum(os.times()[2:4]) - cpu
    (library,) = artefact.directory.rglob("engine.so")
    cubins = cubins_of(library)
    kinds = ", ".join(sorted({cubin.sm for cubin in cubins}))
    return [what, kinds, str(len(cubins)), f"{wall:.0f}", f"{cpu:.0f}", f"{library.stat().st_size:,}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small-only", action="store_true", help="blocks of small models")
    which.add_argument("--parts-only", action="store_true", help="what is no block, ranges of sizes, quantized blocks")
    parser.add_argument("--cache", type=Path, help="keep the engines here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = EngineCache(given.cache or Path(scratch))
        AotInductor().export(Lowering(total(), TARGETS["nvidia-l4"]), cache)  # headers that all builds share
        rows = []
        for case in cases(given):
            rows.append(row(*case, cache))
            print(rows[-1], file=sys.stderr, flush=True)
    print("# Engines for GPUs that are not there\n")
    print(machine(), end="\n\n")
    print(table(["part", "code for", "kernels", "seconds", "of the CPU", "bytes"], rows))


if __name__ == "__main__":
    main()
