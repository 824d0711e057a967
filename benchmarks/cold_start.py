"""Process start to first image, for a bundle and for what it replaces, each in a fresh process with empty caches.

    python benchmarks/cold_start.py [--runs 5] [--compile-runs 3]

`diffkiln.bench` measures: its clock is that of the process that starts the others, up to the first image's bytes. Ways
are interleaved, forwards and backwards in turn. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measuring import DIGITS, machine, ratio, seconds, table

import diffkiln
from diffkiln.evaluate.bench import Rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile-runs", type=int, default=3, help="of torch.compile, which takes long")
    options = parser.parse_args()
    described = machine()
    with tempfile.TemporaryDirectory() as folder:
        bundle = diffkiln.compile(DIGITS / "spec.json", Path(folder) / "bundle").path
        diffkiln.bench(bundle, ["eager"], rounds=Rounds(1, 0, 0))  # files into the page cache
        measured = diffkiln.bench(bundle, ["as_diffusers", "eager"], rounds=Rounds(options.runs, 0, 0)).ways
        compiled = diffkiln.bench(bundle, ["compile"], rounds=Rounds(options.compile_runs, 0, 0)).ways[1]
    eager = measured[2].seconds["start"]
    rows = [
        (
            way.name,
            seconds(found := way.seconds["start"]),
            found.count if found else 0,
            ratio(found, eager),
            ratio(compiled.seconds["start"], found),
        )
        for way in (*measured, compiled)
    ]
    print("# Cold start: process start to first image\n")
    print(described + "\n")
    print("examples/digits, float32, group offload, warm page cache, empty compiler caches.\n")
    print(table(("way", "median (spread)", "runs", "× eager", "times faster than compiling"), rows))
    print(
        "\nGoals: bundle ≤ 0.5 × eager and ≥ 8 times faster than compiling; as_diffusers ≤ 1.15 × eager and ≥ 4 times."
    )


if __name__ == "__main__":
    main()
