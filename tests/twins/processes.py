"""The processes that build and run twins. Building goes on while those that are ready are run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.twins.cases import CASES

_ROOT = Path(__file__).parents[2]


class Building:
    """A process that writes twins, in the order of its cases."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self._process, self._folder, self._log = process, folder, log
        self._seconds: dict[str, float] = {}

    def twin(self, name: str) -> tuple[Path, float]:
        """Waits for a case. Returns its folder, and the seconds that it took to write."""
        assert self._process.stdout is not None
        while name not in self._seconds:
            line = self._process.stdout.readline()
            assert line, f"building twins ended:\n{self._log.read_text()}"
            done = json.loads(line)
            self._seconds[done["case"]] = done["seconds"]
        failed = self._folder / name / "failed"
        assert not failed.exists(), failed.read_text()
        return self._folder / name, self._seconds[name]


@contextmanager
def building(folder: Path, names: Sequence[str]) -> Iterator[Building]:
    """Builds twins inside the `with` block, and ends with it."""
    assert set(names) <= set(CASES)
    log = folder / "log"
    command = [sys.executable, "-m", "tests.twins.building", str(folder), *names]
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield Building(process, folder, log)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def ran(module: str, folder: Path) -> list[dict[str, Any]]:
    """Returns what a module of this folder, `running` or `mistakes`, says of a twin, line by line."""
    command = [sys.executable, "-m", f"tests.twins.{module}", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
