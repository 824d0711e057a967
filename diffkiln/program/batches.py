"""Programs of a component at another batch than its pipeline calls it with, told by their names."""

from __future__ import annotations

from diffkiln.program.ir import Module

#: What is added to the name of a program at twice its batch, and at half of it.
DOUBLED, HALVED = ".doubled", ".halved"


def is_rebatched(module: Module) -> bool:
    """Whether every program of a component is at another batch than its pipeline's own call has."""
    words = {DOUBLED.removeprefix("."), HALVED.removeprefix(".")}
    return bool(module.programs) and all(words & set(name.split(".")) for name in module.programs)
