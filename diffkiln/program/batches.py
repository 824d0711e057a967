"""Programs of a component at another batch than its pipeline calls it with."""

from __future__ import annotations

from diffkiln.program.ir import Module

#: What `Program.batch` says of twice the batch of the pipeline's own call, and of half of it.
DOUBLED, HALVED = "doubled", "halved"


def named_with(name: str, batch: str) -> str:
    """Returns the name of a program at another batch, which is all that a bundle says of it."""
    return f"{name}.{batch}"


def batch_of(name: str) -> str:
    """Returns the batch of a program that is read from a bundle."""
    return next((batch for batch in (DOUBLED, HALVED) if batch in name.split(".")), "")


def is_rebatched(module: Module) -> bool:
    """Returns True if every program of a component is at another batch than its pipeline's own call."""
    return bool(module.programs) and all(program.batch for program in module.programs.values())
