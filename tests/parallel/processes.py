"""Starts several processes, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}


def start(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts `python -m ARGUMENTS` as each of so many processes."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(rank, count, port), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Waits for processes; gives the exit code, the output and the errors of each."""
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            found.append((process.returncode, output, errors))
    finally:
        end(processes)
    return found


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kills what still runs, and closes the pipes."""
    for process in processes:
        process.kill()
        process.communicate()
