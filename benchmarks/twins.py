"""Runs engines for absent GPUs on the CPU, and says how far they are from their replays (tests/twins).

    python benchmarks/twins.py [CASE...]

Needs the extra `twin`. Each row is one process; an error is the largest relative L2 difference from a replay in
float32, over the outputs and the sizes. The seconds are those of generating and compiling, and those of running.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.twins.cases import CASES, MISLAID, MISTAKEN
from tests.twins.processes import building, ran


def main(names: list[str]) -> None:
    print("| region | kernels | launches | error | replay's own | build, s | run, s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, building(Path(folder), names) as process:
        for name in names:
            place, seconds = process.twin(name)
            (row,) = ran("running", place)
            if "fault" in row:
                told = row["fault"].partition("\n")[0]
                print(f"| {name} | {row['kernels']} | {row['launches']} | {told} | | {seconds:.1f} | |", flush=True)
                continue
            errors = f"{max(row['errors']):.1e} | {max(row['own']):.1e}"
            print(
                f"| {name} | {row['kernels']} | {row['launches']} | {errors} | {seconds:.1f} | {row['seconds']:.1f} |",
                flush=True,
            )
        if MISTAKEN in names:
            for row in ran("mistakes", Path(folder) / MISTAKEN):
                print(f"- {row['mistake']}: {row['found']}")


if __name__ == "__main__":
    main(sys.argv[1:] or [*(name for name in CASES if name != MISLAID), MISLAID])
