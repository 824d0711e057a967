"""Running a compiler: it ends in time, with everything that it started, and says why it did not work."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from diffkiln.errors import ExportError


def call(command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float) -> None:
    """Runs `command` in `folder`. An exception ends it with everything that it started.

    The process stays in this process's group, so that Ctrl-C ends it at once, also if a thread waits for it.

    Raises:
        ExportError: it could not be run, failed, was killed or did not finish in `seconds`.
    """
    name = command[0]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise ExportError(f"{name} cannot be run: {error}") from error
    with process:
        _offer(process)
        try:
            _, output = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise ExportError(
                f"{name} did not finish within {_words(seconds)}, and was ended with its child processes. Compile "
                "smaller regions, or on a machine that is less busy"
            ) from error
        except BaseException:
            _end(process)
            raise
    if process.returncode == -signal.SIGKILL or (process.returncode and "Killed signal" in output):
        raise ExportError(
            f"{name} was killed, most likely because memory ran out: compilers have taken up to {_peak()} here. Give "
            "the machine more memory, or run on fewer cores, which compiles fewer files at a time (taskset -c 0)"
        )
    if process.returncode != 0:
        complaints = [line for line in output.splitlines() if "error" in line or "undefined" in line]
        first = "\n".join((complaints or output.splitlines())[:5])
        raise ExportError(f"{name} failed with status {process.returncode}:\n{first}")


def _offer(process: subprocess.Popen[str]) -> None:
    """Makes the kernel end the compiler, not this process, if memory runs out; this process then reports it.

    Processes that the compiler starts inherit this. Source: proc_pid_oom_score_adj(5).
    """
    with suppress(OSError):  # it has ended, or there is no such file here
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a compiler driver with its children (cc1plus, as, ld), which would go on without it."""
    for identity in [process.pid, *_descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(identity, signal.SIGKILL)


def _descendants(parent: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                # The name, in parentheses, may hold anything; after it come the state and the parent.
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found = [parent]
    for identity in found:  # which grows on the way
        found += children.get(identity, ())
    return found[1:]


def _peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB"


def _words(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
