"""The table of faults in benchmarks/results/reliability.md names all forty, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "benchmarks" / "results" / "reliability.md").read_text()


def test_every_fault_has_a_row():
    assert [int(number) for number in re.findall(r"^\| (\d+) ", TABLE, flags=re.M)] == list(range(1, 41))


def test_every_test_that_is_named_exists():
    named = re.findall(r"\| ([\w/]+\.py)::(\w+) \|$", TABLE, flags=re.M)
    assert len(named) >= 40
    for path, name in named:
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(), f"{path}::{name}"
