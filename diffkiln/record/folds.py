"""Programs that are evaluated when a bundle is made: their results are constants of the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffkiln.program import Program


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the keys of the constants that the program takes, and of those that it gives."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """A program of a component's weights and of constants, with its evaluations.

    Attributes:
        component: whose weights it reads.
        program: may call regions.
        regions: by name.
        evaluations: one for each timestep, for example.
        keeps: whether the weights that only it reads stay in the bundle.
    """

    component: str
    program: Program
    regions: Mapping[str, Program]
    evaluations: tuple[Evaluation, ...]
    keeps: bool
