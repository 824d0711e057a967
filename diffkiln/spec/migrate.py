"""Older versions of the spec's format, brought to the current one. There is only version 1 so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.spec.problems import show

CURRENT = 1

#: For each earlier version what makes a spec of the next one of it: a new dict, the given one untouched. A version that
#: changes the format adds a step here, and its bundles and specs to tests/frozen.
STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Returns `data` in the format of the current version.

    Raises `SpecError` for a version that this diffkiln does not know. The model reports a missing version, together
    with the spec's other problems.
    """
    version = data.get("spec_version", CURRENT)
    if type(version) is not int:  # `true` is an int to Python, and 1.0 equals 1
        raise SpecError(problems=[_problem(f"must be a whole number, not {show(version)}", f"Write {CURRENT}")])
    if version > CURRENT:
        reason = f"version {show(version)} is newer than this diffkiln, which reads version {CURRENT}"
        raise SpecError(problems=[_problem(reason, "Upgrade diffkiln: pip install --upgrade diffkiln")])
    if version < CURRENT and version not in STEPS:
        raise SpecError(problems=[_problem(f"there is no version {show(version)}", f"Write {CURRENT}")])
    for earlier in range(version, CURRENT):
        data = STEPS[earlier](data) | {"spec_version": earlier + 1}
    return data


def _problem(reason: str, hint: str) -> Problem:
    return Problem("$.spec_version", reason, hint)
