"""How much sooner twelve trials of the digits pipeline end on two nodes of Ray than on one, on this machine.

    python benchmarks/tuning_on_ray.py

A node has one core. Prints a Markdown table; it belongs to results/tuning.md.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from measuring import DIGITS, machine, table

FORA = {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}


def write(folder: Path) -> Path:
    """Twelve combinations without engines: six numbers of steps, with a schedule and without."""
    spec = json.loads((DIGITS / "spec.json").read_text())
    inputs = [spec["inputs"] | {"num_inference_steps": steps} for steps in (2, 3, 4, 5, 6, 8)]
    spec |= {"source": {"model": str(DIGITS / "model")}, "runtime": {}, "inputs": {"choose": inputs}}
    spec["passes"] = [{"choose": [None, FORA]}]
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    return file


def seconds(spec: Path, name: str, ray: str | None) -> float:
    from diffkiln.evaluate.tune import tune, winner_of

    winner_of(spec).unlink(missing_ok=True)
    begun = time.monotonic()
    tune(spec, spec.parent / name, ray=ray)
    return time.monotonic() - begun


def on_nodes(spec: Path, name: str, count: int) -> float:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(count - 1):
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    try:
        return seconds(spec, name, nodes.address)
    finally:
        nodes.shutdown()


def main() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    described = machine()
    with tempfile.TemporaryDirectory() as name:
        spec = write(Path(name))
        on_nodes(spec, "warm", 2)  # what is read is in memory from here on
        one, two = on_nodes(spec, "one", 1), on_nodes(spec, "two", 2)
        alone = seconds(spec, "alone", None)
    print(described + "\n")
    rows = [
        ("one node of Ray, one core", f"{one:.1f}", ""),
        ("two nodes of Ray, one core each", f"{two:.1f}", f"{two / one:.2f}"),
        ("without Ray, both cores", f"{alone:.1f}", ""),
    ]
    print(table(("twelve trials", "s", "× one node"), rows))


if __name__ == "__main__":
    main()
