"""Programs for calls that use fewer adapters than their layers have slots: beside the full ones, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from diffkiln.program.ir import Program

_COUNT = re.compile(r"\.slots-(\d+)(\.\d+)?$")


def named_for(name: str, count: int, taken: Iterable[str] = ()) -> str:
    """Returns the name of a program for `count` adapters, of which `taken` are other programs' names."""
    wish, number = f"{name}.slots-{count}", 1
    others = set(taken)
    while wish in others:
        number += 1
        wish = f"{name}.slots-{count}.{number}"
    return wish


def is_narrowed(name: str) -> bool:
    """Returns True for the name of a program for fewer adapters than there are slots."""
    return _COUNT.search(name) is not None


def narrowed_of(programs: Mapping[str, Program], name: str) -> dict[int, Program]:
    """Returns the programs that do the same as the one of this name for so many adapters, the fewest first."""
    found = {}
    for other, program in programs.items():
        match = _COUNT.search(other)
        if match and other[: match.start()] == name:
            found[int(match[1])] = program
    return dict(sorted(found.items()))
