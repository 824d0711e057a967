"""Times several ways of one call in turn, A B B A, each in a process of its own; one that fails costs its row alone.

    python benchmarks/gpu/rounds.py WAY... --rows DIR [--runs 10] [--warm 3] [--seconds 540] [--work DIR] [--rehearse]

A row is written as DIR/WAY.json whenever there is more to tell, so what was measured before the time ran out is kept.
Caches of compilers are fresh for each way: the first image after the start of its process is its cold start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Failed(Exception):
    """Why a way has no row."""


def written(file: Path, row: dict[str, Any]) -> None:
    """Write a row, the old or the whole new one: the time may run out in the middle of it."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(row, indent=1))
    new.replace(file)


class Way:
    """One process of `ways.py`, and its row."""

    def __init__(self, name: str, options: argparse.Namespace, until: float) -> None:
        self.name, self._until = name, until
        self._file = options.rows / f"{name}.json"
        self.row: dict[str, Any] = {"way": name, "seconds": []}
        self._room = tempfile.TemporaryDirectory(prefix="diffkiln-gpu-")
        caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), self._room.name)
        command = [sys.executable, str(HERE / "ways.py"), name, "--work", str(options.work)]
        self._log = open(options.rows / f"{name}.log", "w", encoding="utf-8")  # noqa: SIM115  (it lives as long as this)
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--rehearse"] if options.rehearse else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | caches,
        )
        try:
            self._answer()
        except BaseException:
            self.end()  # nobody would hold what goes on loading, and takes the GPU from the others
            raise
        self.row["loaded"] = time.perf_counter() - self._started

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self._answer()

    def run(self, seed: int, counts: bool) -> float:
        seconds = self.ask(f"run {seed}")["seconds"]
        if "first_image" not in self.row:
            # While others load, it waits: that is none of its own time.
            self.row["first_image"] = self.row["loaded"] + seconds
        if counts:
            self.row["seconds"].append(seconds)
        self.keep()
        return seconds

    def keep(self) -> None:
        written(self._file, self.row)

    def fail(self, reason: str) -> None:
        self.row["failed"] = reason
        self.keep()

    def end(self) -> None:
        self._process.kill()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):  # a question that nobody read
                pipe.close()
        self._process.wait()
        self._log.close()
        self._room.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(self._until - time.monotonic(), 0)):
                raise Failed("the time ran out")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        try:
            return json.loads(line)
        except ValueError:
            raise Failed(f"no answer but {line[:200]!r}") from None

    def _last_words(self) -> str:
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            return "it closed its output and goes on"
        lines = [line for line in Path(self._log.name).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"it ended with {self._process.returncode}"


def started(options: argparse.Namespace, until: float) -> list[Way]:
    """The ways that start; the others' rows say why they did not."""
    ways = []
    for name in options.ways:
        print(f"{name}: loading", file=sys.stderr, flush=True)
        try:
            ways.append(Way(name, options, until))
        except Failed as error:
            written(options.rows / f"{name}.json", {"way": name, "seconds": [], "failed": str(error)})
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    return ways


def go_round(ways: list[Way], runs: int, warm: int, until: float) -> None:
    """Run them forwards and backwards in turn, while there is time for one more round and for what `finish` draws."""
    alive, longest = list(ways), 0.0
    for index in range(warm + runs):
        began = time.monotonic()
        if began + 2 * longest > until:
            return
        for way in list(alive) if index % 2 == 0 else list(reversed(alive)):
            try:
                print(f"{way.name}: {way.run(index, index >= warm):.3f} s", file=sys.stderr, flush=True)
                if index == warm - 1:
                    way.ask("memory")  # from here on the peak is that of the runs that count
            except Failed as error:
                way.fail(str(error))
                alive.remove(way)
                print(f"{way.name}: {error}", file=sys.stderr, flush=True)
        longest = max(longest, time.monotonic() - began) if index else 0.0


def finish(ways: list[Way], rows: Path) -> None:
    """Memory, and how far the latents are from those of the first way."""
    for way in ways:
        if "failed" in way.row:
            continue
        try:
            way.row["memory"] = way.ask("memory")
            way.ask(f"latents 0 {rows / way.name}.pt")
            way.row |= compared(rows / f"{way.name}.pt", rows / "eager.pt")
        except (Failed, OSError, RuntimeError) as error:  # a file of latents may be cut short, too
            way.row["unfinished"] = f"{type(error).__name__}: {error}"
            print(f"{way.name}: {error}", file=sys.stderr, flush=True)
        way.keep()


def compared(found: Path, wanted: Path) -> dict[str, float]:
    """Relative L2 and cosine of two files of latents; nothing where there is no second one."""
    import torch

    if not wanted.exists() or found == wanted:
        return {}
    a, b = (torch.load(path, weights_only=True).double().flatten() for path in (found, wanted))
    if a.shape != b.shape:
        return {}
    return {
        "relative_l2": float((a - b).norm() / b.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/diffkiln-gpu"))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.seconds
    ways = started(options, until)
    try:
        go_round(ways, options.runs, options.warm, until)
        finish(ways, options.rows)
    finally:
        for way in ways:
            way.end()


if __name__ == "__main__":
    main()
