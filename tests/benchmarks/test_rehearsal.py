"""`benchmarks/gpu/run.sh` from beginning to end without a GPU: the tiny pipelines, weights on the simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.tables import WAYS
from benchmarks.gpu.ways import BUILT
from benchmarks.measuring import median

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"


def ran(folder: Path, *parts: str, **environment: str) -> tuple[int, str, str]:
    """Rehearses these parts; returns the status, the table, and what is said of the parts."""
    told = {"REHEARSE": "1", "RUNS": "1", "WARM": "1", "PYTHON": sys.executable} | environment
    places = {"ROWS": str(folder / "rows"), "WORK": str(folder / "work"), "TABLE": str(folder / "table.md")}
    done = subprocess.run(
        [SCRIPT, *parts], env=os.environ | places | told, capture_output=True, text=True, timeout=1800
    )
    table = folder / "table.md"
    return done.returncode, table.read_text() if table.exists() else "", done.stderr


@pytest.mark.long
def test_each_part_writes_its_rows(tmp_path: Path) -> None:
    """With the streamed bundle, and replays resident, from the host and from the disk, on the simulated device."""
    parts = ("ceilings", "build-streamed", "streamed", "replay")
    status, table, told = ran(tmp_path, *parts, SECONDS_IN_ALL="780")
    assert status == 0, told
    rows = tmp_path / "rows"
    assert len(json.loads((rows / "ceilings.json").read_text())) == 6
    assert (tmp_path / "work" / "bundle-fp8-streamed" / "manifest.json").is_file()
    row = json.loads((rows / "bundle-fp8-streamed.json").read_text())
    assert "failed" not in row
    assert "unfinished" not in row
    assert len(row["seconds"]) == 1
    for name in ("sd", "sdxl"):
        replayed = (rows / f"replay-{name}.txt").read_text()
        assert "failed" not in replayed
        assert all(
            f"| bundle, {how} | " in replayed for how in ("resident", "streamed from host", "streamed from disk")
        )
        assert replayed in table
    assert "| bundle, fp8, conditioning hoisted, weights streamed from the host | " in table
    assert "| diffusers, eager | not measured |" in table


#: Every other part that measures, and the ways whose rows it writes. `tests` needs a GPU.
REST = {
    "eager": ("eager", "eager-cudnn"),
    "compile": ("compile-blocks", "compile-full", "pruna-like"),
    "build-bf16": (),
    "bf16": ("bundle-bf16",),
    "graphs": ("bundle-bf16-step-graphs", "bundle-bf16-program-graphs"),
    "build-untuned": (),
    "untuned": ("bundle-bf16-untuned",),
    "build-hoisted": (),
    "hoisted": ("bundle-bf16-hoisted",),
    "build-fp8": (),
    "fp8": ("bundle-fp8",),
    "build-mask": (),
    "mask": ("bundle-fp8-mask",),
    "offload": ("offload-group", "offload-model", "offload-sequential"),
}


#: diffusers takes these on a machine with an accelerator alone. Each costs its own row.
NO_CPU = ("offload-model", "offload-sequential")


@pytest.mark.long
@pytest.mark.timeout(1900)
def test_every_other_part_writes_its_rows(tmp_path: Path) -> None:
    """Bundles draw what diffusers draws, but for the one with a mask, which leaves out every second step."""
    _, table, told = ran(tmp_path, *REST, SECONDS_IN_ALL="1700")
    rows = {way: json.loads((tmp_path / "rows" / f"{way}.json").read_text()) for ways in REST.values() for way in ways}
    for way in NO_CPU:
        assert "requires accelerator" in rows.pop(way)["failed"]
    for way, row in rows.items():
        assert not {"failed", "unfinished"} & row.keys(), (way, told)
        assert len(row["seconds"]) == (2 if way == "offload-group" else 1), way
    assert rows["bundle-fp8-mask"]["relative_l2"] > 1e-3
    for way in BUILT.keys() - {"bundle-fp8-mask", "bundle-fp8-streamed"} | {"offload-group"}:
        assert rows[way]["relative_l2"] < 1e-3, way
    assert all(f"| {WAYS[way]} | {median(row['seconds']):.3f} |" in table for way, row in rows.items())


STAND_IN = """#!/usr/bin/env bash
# In the place of Python: one part fails, one writes its row, one never ends.
case "$*" in
    *ceilings.py*) echo "out of memory" >&2; exit 3 ;;
    *rounds.py*) echo '{"way": "eager", "seconds": [2.0]}' >"$ROWS/eager.json" ;;
    *ways.py*) exec sleep 300 ;;
    *tables.py*) exec "$REAL" "$@" ;;
esac
"""


@pytest.mark.more
def test_a_part_that_fails_or_does_not_end_leaves_the_others_rows(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "REAL": sys.executable, "SECONDS_IN_ALL": "40"}
    status, table, told = ran(tmp_path, "ceilings", "eager", "build-bf16", "offload", **environment)
    assert status == 1
    assert "ceilings: failed" in told
    assert "eager: failed" not in told
    assert "build-bf16: failed" in told
    assert "offload: no time left" in told
    assert "| diffusers, eager | 2.000 |" in table
