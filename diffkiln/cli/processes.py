"""Several processes of one command, which run a bundle's calls together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource

from diffkiln.cli.printing import say
from diffkiln.errors import PeerLost

#: Seconds that processes have to end by themselves after one of them has failed.
_PATIENCE = 10.0
_PAUSE = 0.05

PROCESSES = click.option(
    "--processes",
    type=click.IntRange(2, 128),
    metavar="N",
    help="Start N processes, for a bundle that runs in several (default: this one, or torchrun's).",
)


def is_started() -> bool:
    """Returns True in a process that was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_in_processes(count: int, bundle: Path) -> None:
    """Runs the command of the current context in so many processes, and ends as they end.

    Raises:
        UsageError: the bundle runs in another number of processes.
        PeerLost: a process ended by a signal; says which.
        SystemExit: a process failed; with its exit code.
    """
    _check_count(count, bundle)
    arguments = list(_arguments(click.get_current_context()))
    with tempfile.TemporaryDirectory() as folder:
        files = [open(Path(folder, str(rank)), "w+", encoding="utf-8") for rank in range(count)]  # noqa: SIM115
        try:
            codes = _ended(_started(arguments, files))
            _report(codes, files)
        finally:
            for file in files:
                file.close()


def _check_count(count: int, path: Path) -> None:
    from diffkiln.bundle import open_bundle
    from diffkiln.runtime.processes import mesh_of

    with open_bundle(path, ignore_signature=True) as bundle:
        mesh = mesh_of(bundle.manifest)
    if mesh is None:
        raise click.UsageError('This bundle runs in one process: its spec has no "parallel". Leave out --processes')
    if mesh.size != count:
        raise click.UsageError(f"This bundle runs in {mesh.size} processes ({mesh}). Use --processes {mesh.size}")


def _arguments(context: click.Context) -> Iterator[str]:
    """Yields the arguments of a command as they were given, but the number of processes."""
    yield str(context.info_name)
    last: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name == "processes" or context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            continue
        value: Any = context.params[name]
        if isinstance(parameter, click.Argument):
            last.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            yield parameter.opts[0]
        else:
            for item in value if parameter.multiple else (value,):  # type: ignore[attr-defined]
                yield f"{parameter.opts[-1]}={item}"
    yield from ("--", *last)


def _started(arguments: Sequence[str], files: Sequence[IO[str]]) -> list[subprocess.Popen[str]]:
    """Starts the processes. The first one prints; what the others print goes to files."""
    count, port = len(files), _free_port()
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-P", "-m", "diffkiln", *arguments]
    started: list[subprocess.Popen[str]] = []
    for rank, file in enumerate(files):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = {} if rank == 0 else {"stdout": file, "stderr": file}
        started.append(subprocess.Popen(command, env=own, text=True, stdin=subprocess.DEVNULL, **output))  # type: ignore[call-overload]
    return started


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _ended(processes: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Waits for processes, and returns their exit codes. Once one has failed, the others are ended in ten seconds."""
    ends = float("inf")
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < ends:
            if ends == float("inf") and any(process.poll() for process in processes):
                ends = time.monotonic() + _PATIENCE
            time.sleep(_PAUSE)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.wait() for process in processes]


def _report(codes: Sequence[int], files: Sequence[IO[str]]) -> None:
    """Says what processes that failed have printed, once for each that says something else, and ends as they did."""
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return
    for rank in failed:
        files[rank].seek(0)
        if lines := files[rank].read().strip().splitlines():
            say(f"process {rank}: {lines[-1]}")
    if killed := [rank for rank in failed if codes[rank] < 0]:
        code = -codes[killed[0]]
        raise PeerLost(f"process {killed[0]} of {len(codes)} was ended by signal {code}. Start all of them anew")
    own = [codes[rank] for rank in failed if codes[rank] != PeerLost.exit_code]
    raise SystemExit(own[0] if own else PeerLost.exit_code)
