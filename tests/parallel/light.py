"""One of four processes that run a light program again and again, with random delays.

    python -m tests.parallel.light RUNS [FATE]

FATE is killed, failing or other-call: what becomes of process 3 in the second run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import torch

from diffkiln.errors import PeerLost
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import Mesh
from diffkiln.runtime.processes import shared_operations
from diffkiln.runtime.processes.distributed import Distributed
from tests.parallel.programs import MESH, light, wanted


def main(runs: int, fate: str = "") -> None:
    group = Distributed(Mesh(MESH), torch.device("cpu"))
    random.seed(group.rank)
    count = 0

    def delayed() -> None:
        nonlocal count
        count += 1
        time.sleep(random.random() * 0.01)
        if fate and group.rank == 3 and count == 6:
            doom(fate, group)

    run = Interpreter(light(), special=shared_operations(group), watch=delayed)
    for number in range(runs):
        value = torch.arange(32.0).reshape(1, 4, 8) + number
        group.agree(bytes([number % 256, fate == "other-call" and group.rank == 3]) * 16)
        found = run([value, -value])
        for got, want in zip(found, wanted(value), strict=True):
            assert torch.equal(got, want)
    print(f"sent {group.sent}")
    group.close()


def doom(fate: str, group: Distributed) -> None:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "failing":
        group.fail("ValueError: a callback went wrong")
        time.sleep(30)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), *sys.argv[2:])
    except PeerLost as error:
        print(error, file=sys.stderr)
        os._exit(error.exit_code)
