"""What the benchmarks share: the machine's description, medians with their spread, and Markdown tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffkiln.evaluate import machine as machines
from diffkiln.evaluate.memory import Peak
from diffkiln.evaluate.numbers import NOT_MEASURED, Spread
from diffkiln.guards.host_memory import highest

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits"


def machine() -> str:
    """One paragraph: processor, cores, memory, and the versions that matter."""
    return machines.in_a_line(machines.machine())


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Lowest to highest."""
    return f"{min(values):.3g}–{max(values):.3g}"


def seconds(found: Spread | None, unit: str = "s") -> str:
    """A median with its spread, in seconds or in ms."""
    if found is None:
        return NOT_MEASURED
    shown = found.scaled(1e3) if unit == "ms" else found
    return f"{shown.median:.3g} {unit} ({shown.lowest:.3g}–{shown.highest:.3g})"


def ratio(one: Spread | None, other: Spread | None) -> str:
    """Returns the ratio of two medians, the one's over the other's."""
    return f"{one.median / other.median:.2f}" if one and other else NOT_MEASURED


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


class Watch:
    """Seconds of each step, and the most memory of this process and its children together while it ran.

    `rows` has of each step its name, seconds, this process's peak so far as the kernel has it, and the peak of all.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self._end: Callable[[], None] | None = None

    def begin(self, step: str) -> None:
        """A step begins, and with it the one before ends."""
        self.end()
        peak, stack = Peak(), ExitStack()
        stack.enter_context(peak.watched())
        started = time.perf_counter()

        def end() -> None:
            seconds = time.perf_counter() - started
            stack.close()
            self.rows.append((step, f"{seconds:.1f} s", f"{highest() / 1e9:.2f} GB", f"{peak.bytes / 1e9:.2f} GB"))

        self._end = end

    def end(self) -> None:
        """The last step ends."""
        if self._end is not None:
            self._end()
            self._end = None

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self.begin(step)
        yield
        self.end()
