"""Programs for calls that use fewer adapters than their layers have slots, beside the full ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffkiln.program.ir import Program


def named_for(name: str, count: int, taken: Iterable[str] = ()) -> str:
    """Returns a name for the program that computes `count` slots in the place of another, none of the `taken` ones."""
    wish, number, others = f"{name}.slots-{count}", 1, set(taken)
    found = wish
    while found in others:
        number += 1
        found = f"{wish}.{number}"
    return found


def full(programs: Mapping[str, Program]) -> dict[str, Program]:
    """Returns the programs that compute all slots."""
    return {name: program for name, program in programs.items() if program.slots is None}


def narrowed_of(programs: Mapping[str, Program], name: str) -> dict[int, Program]:
    """Returns the programs in the place of the one of this name, by the number of slots that they compute."""
    found = {each.slots: each for each in programs.values() if each.slots is not None and each.instead_of == name}
    return dict(sorted(found.items()))
