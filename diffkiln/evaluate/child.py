"""One way to draw, in a process of its own, which another process measures.

    python -m diffkiln.evaluate.child

It reads a job as a line of JSON, loads, draws once, and says so; then it draws once more for each line "run". Each
answer is a line of JSON on the standard output. It imports nothing but what the way needs: a bundle is loaded and run
without diffusers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from diffkiln.errors import DiffkilnError
from diffkiln.evaluate.opening import open_way, taken


def main() -> int:
    """Runs the job that the standard input names, until that ends. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    try:
        _serve(job, answer)
    except DiffkilnError as error:
        answer(error=str(error))
        return error.exit_code
    return 0


def _serve(job: Mapping[str, Any], answer: Callable[..., None]) -> None:
    begun = time.perf_counter()
    pipe = open_way(job)
    loaded = time.perf_counter() - begun
    from diffkiln.evaluate.calls import Call, keywords_of

    call = Call(**job["call"])
    keywords = taken(pipe, keywords_of(call, job["prompts"], job["seeds"]))
    answer(event="image", bytes=_bytes(pipe(**keywords)), load=loaded)
    from diffkiln.evaluate.energy import Meter
    from diffkiln.evaluate.phases import Stopwatch
    from diffkiln.guards.host_memory import highest
    from diffkiln.runtime.accelerator import peak

    stopwatch = Stopwatch(pipe)
    meter = Meter(stopwatch.device)
    for _ in sys.stdin:
        before = brought(pipe)
        meter.start()
        _, timed = stopwatch.call(**taken(pipe, keywords_of(call, job["prompts"], job["seeds"])))
        joules = meter.joules()
        found = peak(stopwatch.device)
        answer(
            event="run",
            total=timed.total,
            phases=timed.phases,
            steps=timed.steps,
            host=highest(),
            device=found.allocated if found else None,
            reserved=found.reserved if found else None,
            joules=joules,
            moved=None if before is None else brought(pipe) - before,
        )


def brought(pipe: Any) -> Any:
    """Returns the bytes of weights that a bundle has brought to its device; None for a pipeline of diffusers."""
    return pipe.executor.store.bytes_brought if hasattr(pipe, "bundle") else None


def _bytes(result: Any) -> int:
    """Returns how many bytes the first result has: a picture is there when its bytes are."""
    first = next(iter(result.values()))
    while isinstance(first, list | tuple):
        first = first[0]
    return len(first.tobytes()) if hasattr(first, "tobytes") else int(getattr(first, "nbytes", 0))


if __name__ == "__main__":
    sys.exit(main())
