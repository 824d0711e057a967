"""Planned against measured memory of pipelines of 300 to 450 million parameters, with all weights and within limits.

    python benchmarks/memory.py FOLDER [flux sd pixart …]

Each row is a process of its own. Measured is the most memory that it had in two calls, without what it had after its
imports. A limit is what the plan without one takes and a MiB more, or a share of what was measured without one; the
last row has the smallest that is not refused. Bundles are built in FOLDER, where what is there already is used again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARES = (75, 50, 25)
STEPS = 2
PROMPT = "a small red fox in a green forest"


def main() -> None:
    """Builds, measures, and prints the table."""
    sys.path.insert(0, str(ROOT))
    folder, names = Path(sys.argv[1]), sys.argv[2:] or ["flux", "sd", "pixart"]
    print(
        "| pipeline | limit | planned | of it working memory | measured | measured / planned | brought in by a call |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        bundle = _built(name, folder)
        resident = _measured(bundle, None)
        _show(name, "none", resident)
        limit = resident["planned"] + 2**20
        _show(name, f"all weights: {_mib(limit)}", _measured(bundle, limit))
        for share in SHARES:
            limit = resident["measured"] * share // 100
            _show(name, f"{share} %: {_mib(limit)}", _measured(bundle, limit))
        least = _measured(bundle, 1)["needed"]
        _show(name, f"smallest: {_mib(least)}", _measured(bundle, least))


def _show(name: str, limit: str, row: dict[str, Any]) -> None:
    if "needed" in row:
        print(f"| {name} | {limit} | refused: {_mib(row['needed'])} are required | | | | |", flush=True)
        return
    ratio = row["measured"] / row["planned"]
    sizes = [_mib(row[key]) for key in ("planned", "working", "measured", "brought")]
    print(f"| {name} | {limit} | {sizes[0]} | {sizes[1]} | {sizes[2]} | {ratio:.3f} | {sizes[3]} |", flush=True)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _built(name: str, folder: Path) -> Path:
    import diffkiln
    from benchmarks.peers.pipelines import MID, save

    source, bundle = folder / f"{name}-source", folder / name
    if not source.exists():
        os.environ.setdefault("MKL_CBWR", "AUTO")  # the tests' tokenizers would ask for other arithmetic
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
    import diffkiln.runtime.loading
    from diffkiln.errors import Incompatible

    before = _status("VmRSS")
    try:
        with diffkiln.load(bundle, max_memory=limit, check_engines=False, allow_native=True) as pipe:
            for seed in range(2):
                pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="pt", allow_nan=True)
    except Incompatible as error:
        print(json.dumps({"needed": int(_REQUIRED.search(str(error))[1].replace(",", ""))}))  # type: ignore[index]
        return
    measured = _status("VmHWM") - before
    calls = next(iter(diffkiln.plan_memory(bundle, max_memory=limit).values()))
    plan = next(iter(calls.values()))
    row = {"planned": plan.residency.peak, "measured": measured, "brought": plan.residency.brought}
    print(json.dumps({**row, "working": plan.working.nbytes if plan.working else 0}))


_REQUIRED = re.compile(r"required ([\d,]+)")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        once(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
