"""The memory that a process takes in a call besides weights, constants and results: its *working memory*.

That is code of libraries that the call touches, programs as objects, and what kernels and the C library keep for
themselves. It does not follow from a program, so a build measures it in a process of its own and notes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: A bundle with fewer bytes of weights is planned without working memory, which would be most of its plan.
PLANNED_FROM = 64 * 2**20
#: What is planned where nothing was measured, in bytes: more than any pipeline of benchmarks/results/memory.md takes.
ESTIMATE = 160 * 2**20
#: What each thread beyond those of the measurement adds, in bytes: MKL's buffers of one thread, which
#: `mkl_serv_mem_stat` shows for a FLUX of 285 million parameters.
PER_THREAD = 10 * 2**20


@dataclass(frozen=True)
class WorkingMemory:
    """The working memory of a process.

    Attributes:
        nbytes: its most in a call.
        measured: whether a build measured it; else it is an estimate.
    """

    nbytes: int
    measured: bool

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes of working memory, {self.origin}"

    @property
    def origin(self) -> str:
        """Returns where the number comes from, as a word."""
        return "measured" if self.measured else "estimated"

    def as_json(self) -> dict[str, Any]:
        """Returns it as a JSON value; the size in bytes."""
        return {"bytes": self.nbytes, "measured": self.measured}


def working_memory(weights: int, rows: Mapping[str, Mapping[str, int]], threads: int) -> WorkingMemory | None:
    """Returns the working memory of a process on a CPU; None for a bundle that is planned without.

    Args:
        weights: bytes of the bundle's.
        rows: what was measured, by target: `bytes`, and the `threads` that computed.
        threads: that will compute.
    """
    if rows:
        return WorkingMemory(max(_with(row, threads) for row in rows.values()), True)
    return WorkingMemory(ESTIMATE, False) if weights >= PLANNED_FROM else None


def _with(row: Mapping[str, int], threads: int) -> int:
    return row["bytes"] + max(threads - row["threads"], 0) * PER_THREAD
