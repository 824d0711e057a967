"""Types of a program that a backend behind ONNX does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from diffkiln.program import Program
from diffkiln.program.pairs import PARTS, pair_problems


def refused_of(program: Program, refusal: Callable[[str], str | None]) -> Iterator[str]:
    """Yields why types of a program are not taken, each once, with its first user. Complex numbers count as pairs.

    Args:
        program: of a region.
        refusal: returns why a type is not taken; None if it is.
    """
    reported: set[str] = set()
    for name, kind in program.types.items():
        dtype = PARTS.get(kind.dtype, kind.dtype)
        reason = None if dtype in reported else refusal(dtype)
        if reason:
            reported.add(dtype)
            yield f"{reason} ({name.lstrip('%@#')} of {program.name})"
    yield from pair_problems(program)
