"""Hostile arguments for every operator of the closed list: the table of benchmarks/results/reliability.md.

    python benchmarks/operators.py [--attempts 1000]

Each operator runs in a child process whose tensors end at a page that nothing may read, twice, with freed memory filled
with another byte each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffkiln.program.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[1]


PARTS = 16


def rows(attempts: int, perturb: int) -> tuple[list[dict[str, Any]], int]:
    """Returns a row an operator, and how many processes crashed. What a crashed one had still to do is missing."""
    found, crashes = [], 0
    for part in range(PARTS):
        command = [sys.executable, "-W", "ignore", "-m", "tests.interpreter.hostile"]
        command += ["--attempts", str(attempts), "--part", f"{part}/{PARTS}"]
        environment = os.environ | {"MALLOC_PERTURB_": str(perturb), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        crashes += done.returncode != 0
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found += [line for line in lines if "ran" in line]
    return found, crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=1000)
    attempts = parser.parse_args().attempts
    first, crashed = rows(attempts, 0x55)
    second, crashed_again = rows(attempts, 0xAA)
    digests = {row["operator"]: row["digest"] for row in second}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in first:
        entry = OPERATORS[row["operator"]].infer
        groups.setdefault(entry.__module__.rpartition(".")[2], []).append(row)
    print("| operators | of them | attempts | refused | too large | raised | ran | wrong type | foreign | leaked | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, group in sorted(groups.items()):
        sums = [sum(row[key] for row in group) for key in ("refused", "large", "raised", "ran")]
        wrong, foreign = (sum(len(row[key]) for row in group) for key in ("wrong", "foreign"))
        leaked = sum(row["digest"] != digests.get(row["operator"]) for row in group)
        cells = [name, len(group), len(group) * attempts, *sums, wrong, foreign, leaked]
        seconds = sum(row["seconds"] for row in group)
        print(
            "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + f" | {seconds:.0f} |"
        )
    print(f"\nProcesses that crashed: {crashed + crashed_again}. Peak: {max(row['peak_mib'] for row in first)} MiB.")


if __name__ == "__main__":
    main()
