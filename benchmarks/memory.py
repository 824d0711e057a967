"""Planned against measured memory of pipelines of 300 to 450 million parameters, with all weights and within limits.

    python benchmarks/memory.py FOLDER [flux sd …]

Each row is a process of its own. Measured is the most memory that it had in two calls, without what it had after its
imports. Bundles are built in FOLDER, where what is there already is used again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARES = (100, 75, 50, 25)
STEPS = 2
PROMPT = "a small red fox in a green forest"


def main() -> None:
    """Builds, measures, and prints the table."""
    sys.path.insert(0, str(ROOT))
    folder, names = Path(sys.argv[1]), sys.argv[2:] or ["flux", "sd"]
    print("| pipeline | limit | planned | measured | measured / planned | weights brought in by a call |")
    print("|---|---|---|---|---|---|")
    for name in names:
        bundle = _built(name, folder)
        resident = _measured(bundle, None)
        _show(name, "none", resident)
        for share in SHARES[1:]:
            _show(name, f"{share} %", _measured(bundle, resident["planned"] * share // 100))


def _show(name: str, limit: str, row: dict[str, Any]) -> None:
    if "refused" in row:
        print(f"| {name} | {limit} | refused: {row['refused']} | | | |", flush=True)
        return
    ratio = row["measured"] / row["planned"]
    sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("planned", "measured", "brought")]
    print(f"| {name} | {limit} | {sizes[0]} | {sizes[1]} | {ratio:.3f} | {sizes[2]} |", flush=True)


def _built(name: str, folder: Path) -> Path:
    import diffkiln
    from benchmarks.peers.pipelines import MID, save

    source, bundle = folder / f"{name}-source", folder / name
    if not source.exists():
        save(name, source)
    if not bundle.exists():
        keywords = {**MID[name].call, "num_inference_steps": STEPS}
        own = {key: keywords.pop(key) for key in list(keywords) if key in _INPUTS}
        spec = {
            "spec_version": 1,
            "source": {"model": str(source.absolute())},
            "target": {"device": "cpu"},
            "inputs": {**own, **({"call": keywords} if keywords else {})},
            "passes": MID[name].passes,
        }
        diffkiln.compile(spec, bundle)
    return bundle


#: Fields of a spec's `inputs`; other keywords stand in `call`.
_INPUTS = {"height", "width", "num_frames", "num_inference_steps", "guidance_scale"}


def _measured(bundle: Path, limit: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--once", str(bundle), json.dumps(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def once(bundle: str, limit: int | None) -> None:
    """Draws twice within a limit, and prints what was planned and what was measured."""
    import torch

    import diffkiln
    from diffkiln.errors import Incompatible

    torch.nn.functional.conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3))  # libraries take their memory
    try:
        calls = next(iter(diffkiln.plan_memory(bundle, max_memory=limit).values()))
    except Incompatible as error:
        print(json.dumps({"refused": str(error).partition(", for")[0]}))
        return
    plan = next(iter(calls.values())).residency
    before = _status("VmRSS")
    with diffkiln.load(bundle, max_memory=limit, check_engines=False, allow_native=True) as pipe:
        for seed in range(2):
            pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="pt", allow_nan=True)
    print(json.dumps({"planned": plan.peak, "measured": _status("VmHWM") - before, "brought": plan.brought}))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        once(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
