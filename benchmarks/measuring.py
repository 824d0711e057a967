"""What the benchmarks share: the machine's description, medians with their spread, and Markdown tables."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits"


def machine() -> str:
    """One paragraph: processor, cores, memory, and the versions that matter."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("torch", "diffusers", "transformers", "torchao", "accelerate")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {versions}; "
        f"load when it began {os.getloadavg()[0]:.1f}"
    )


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Lowest to highest."""
    return f"{min(values):.3g}–{max(values):.3g}"


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
        self._peak = 0
        self._end: Callable[[], None] | None = None

    def begin(self, step: str) -> None:
        """A step begins, and with it the one before ends."""
        self.end()
        ended = threading.Event()
        self._peak = 0
        sampler = threading.Thread(target=self._sample, args=(ended,), daemon=True)
        sampler.start()
        started = time.perf_counter()

        def end() -> None:
            seconds = time.perf_counter() - started
            ended.set()
            sampler.join()
            self.rows.append((step, f"{seconds:.1f} s", f"{_highest() / 1e9:.2f} GB", f"{self._peak / 1e9:.2f} GB"))

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

    def _sample(self, ended: threading.Event) -> None:
        while not ended.wait(0.2):
            self._peak = max(self._peak, sum(map(_resident, _family())))


def _highest() -> int:
    """The most memory that this process has had, in bytes; getrusage's would count the parent's before `exec`, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def _family() -> list[int]:
    """This process and all that descend from it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    own = {int(Path("/proc/self").resolve().name)}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sorted(own)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0
