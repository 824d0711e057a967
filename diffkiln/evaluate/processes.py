"""Processes that draw in one way each, and the clock of the process that started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffkiln.errors import Incompatible
from diffkiln.evaluate.ways import Way

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Started:
    """A process that has drawn its first image.

    Attributes:
        way: how it draws.
        seconds: from the start of the process to the first image.
        load: seconds of the load alone, as the process tells them.
    """

    way: Way
    seconds: float
    load: float
    _child: subprocess.Popen[str] = field(repr=False)
    _log: Any = field(repr=False)

    def run(self) -> dict[str, Any]:
        """Returns the times and the memory of one more call."""
        assert self._child.stdin is not None
        self._child.stdin.write("run\n")
        self._child.stdin.flush()
        return _answer(self.way, self._child, self._log)


@contextmanager
def started(way: Way, prompts: Sequence[str], seed: int) -> Iterator[Started]:
    """Starts a process with empty compiler caches, waits for its first image, and ends it after the `with` block.

    Raises:
        Incompatible: the process cannot load or draw; says why.
    """
    job = {
        **way.job,
        "call": way.call.as_json(),
        "prompts": list(prompts),
        "seeds": [seed + row for row in range(way.call.batch)],
    }
    with tempfile.TemporaryDirectory() as caches, tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, **dict.fromkeys(_CACHES, caches)}
        command = [sys.executable, "-P", "-m", "diffkiln.evaluate.child"]
        begun = time.perf_counter()
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            first = _answer(way, child, log)
            yield Started(way, time.perf_counter() - begun, first["load"], child, log)
        finally:
            _end(child)


def _answer(way: Way, child: subprocess.Popen[str], log: Any) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        log.seek(0)
        lines = [text.strip() for text in log.read().splitlines() if text.strip()]
        raise Incompatible(f"{way.name}: its process ended without an image. The last that it said: {lines[-1:]}")
    answer = json.loads(line)
    if "error" in answer:
        raise Incompatible(f"{way.name} cannot be measured: {answer['error']}")
    return answer


def _end(child: subprocess.Popen[str]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # it has ended already
                continue
    try:
        child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
