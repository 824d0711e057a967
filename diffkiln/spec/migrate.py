"""Older versions of the spec's format, brought to the current one. There is only version 1 so far."""

from __future__ import annotations

from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.spec.problems import show

CURRENT = 1


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """`data` in the format of the current version.

    Raises `SpecError` for a version that this diffkiln does not know. A version that is missing is left to the model
    to report, together with the spec's other problems.
    """
    version = data.get("spec_version", CURRENT)
    if type(version) is not int:  # `true` is an int to Python, and 1.0 equals 1
        raise SpecError(problems=[_problem(f"must be a whole number, not {show(version)}", f"Write {CURRENT}")])
    if version > CURRENT:
        reason = f"version {show(version)} is newer than this diffkiln, which reads version {CURRENT}"
        raise SpecError(problems=[_problem(reason, "Upgrade diffkiln: pip install --upgrade diffkiln")])
    if version < CURRENT:
        raise SpecError(problems=[_problem(f"there is no version {show(version)}", f"Write {CURRENT}")])
    return data


def _problem(reason: str, mend: str) -> Problem:
    return Problem("$.spec_version", reason, mend)
