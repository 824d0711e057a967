"""How this process was started: alone, or as one of several."""

from __future__ import annotations

import os

from diffkiln.errors import Incompatible
from diffkiln.program import Mesh

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def local_rank() -> int:
    """Returns which process of this machine this one is, as torchrun numbers them; 0 for one alone."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def is_one_of_several() -> bool:
    """Returns True if torchrun, or `diffkiln run`, has started this process as one of several."""
    return all(name in os.environ for name in _VARIABLES) and number_of("WORLD_SIZE") > 1


def check_started(mesh: Mesh) -> None:
    """Checks that this process was started as one of as many as a bundle needs.

    Raises:
        Incompatible: it was not; says how.
    """
    found = number_of("WORLD_SIZE") if all(name in os.environ for name in _VARIABLES) else 1
    if found != mesh.size:
        here = "this process is alone" if found == 1 else f"{found} were started"
        raise Incompatible(
            f"this bundle runs in {mesh.size} processes ({mesh}), and {here}. Start it with `diffkiln run --processes "
            f"{mesh.size}`, or your script with `torchrun --nproc-per-node {mesh.size}`"
        )


def number_of(name: str) -> int:
    """Returns a number of the environment. Raises `Incompatible` if it is none."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise Incompatible(f"{name}={text!r} in the environment is no number of processes. torchrun sets it")
    return int(text)
