"""No operator of the closed list reaches outside of its tensors, whatever its arguments are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from diffkiln.program.operators import OPERATORS

ATTEMPTS = 200
#: Mebibytes: torch itself takes some 400 of them.
PEAK = 1500


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return hostile(perturb=0x55)


def hostile(perturb: int) -> list[dict[str, Any]]:
    """What became of every operator, in a child process whose freed memory is filled with a byte."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreter.hostile", "--attempts", str(ATTEMPTS)]
    environment = os.environ | {"MALLOC_PERTURB_": str(perturb), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the process ended at {found[-1]}: {done.stderr[-1000:]}"
    return [row for row in found if "ran" in row]


def test_no_arguments_end_the_process(rows):
    assert [row["operator"] for row in rows] == sorted(OPERATORS)
    assert min(row["refused"] + row["ran"] + row["raised"] + row["large"] for row in rows) == ATTEMPTS


def test_each_operator_runs_on_some_of_its_arguments(rows):
    """Or the attempts would show nothing."""
    assert [row["operator"] for row in rows if not row["ran"]] == []


def test_results_have_the_types_that_were_predicted(rows):
    assert {row["operator"]: row["wrong"] for row in rows if row["wrong"]} == {}


def test_what_operators_raise_is_what_the_interpreter_expects(rows):
    assert {row["operator"]: row["foreign"] for row in rows if row["foreign"]} == {}


def test_results_hold_no_memory_as_it_was_found(rows):
    """Freed memory holds another byte in the second process, and the results are the same."""
    again = {row["operator"]: row["digest"] for row in hostile(perturb=0xAA)}
    assert [row["operator"] for row in rows if row["digest"] != again[row["operator"]]] == []


def test_attempts_stay_within_their_memory_and_time(rows):
    assert max(row["peak_mib"] for row in rows) < PEAK
    assert max(row["seconds"] for row in rows) < 60
