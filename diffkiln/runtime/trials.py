"""Which engines a load compares with the replay of their regions: those that no receipt vouches for.

The build has compared every engine. What a load adds is this machine, so on a CPU the smallest engine of each kind
stands for its kind, and none is tried that would take longer than the load itself, such as a whole decoder. On a GPU,
which a build may never have seen, all are tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from diffkiln.bundle import EngineEntry, Tried, Verified
from diffkiln.guards.printable import get_logger
from diffkiln.program import Module, Program
from diffkiln.runtime.compatibility import machine

log = get_logger(__name__)

#: The most elements that all values of a region may have for a trial on a CPU: a few tenths of a second.
LARGEST = 2**26
_NUMBER = re.compile(r"-\d+$")


class Trials:
    """The engines that a load is to try.

    Args:
        verified: the bundle.
        rows: the engines that are loaded.
        modules: the components' programs.
        device: where they run.
        wanted: True tries all, False none, None those that need it.
    """

    def __init__(
        self,
        verified: Verified,
        rows: Sequence[EngineEntry],
        modules: Mapping[str, Module],
        device: torch.device,
        wanted: bool | None,
    ) -> None:
        self._tried = Tried(verified, machine(verified.manifest.requires, device))
        self._wanted = wanted
        self._standing = chosen(rows, modules) if device.type == "cpu" else {row.path for row in rows}

    def wants(self, path: str) -> bool:
        if self._wanted is not None:
            return self._wanted
        return path in self._standing and not self._tried.has(path)

    def passed(self, path: str) -> None:
        self._tried.note(path)


def chosen(rows: Sequence[EngineEntry], modules: Mapping[str, Module]) -> set[str]:
    """Returns the paths of the smallest engine of each kind, unless it is too large to try at a load."""
    smallest: dict[tuple[str, str, str], tuple[int, str]] = {}
    for row in rows:
        region = modules[row.component].regions.get(row.region) if row.component in modules else None
        if region is None:  # whoever opens the engine says so
            continue
        kind = (row.component, row.backend, _NUMBER.sub("", row.region))
        smallest[kind] = min(smallest.get(kind, (elements(region), row.path)), (elements(region), row.path))
    for (component, _, name), (count, _) in smallest.items():
        if count > LARGEST:
            log.info("%s/%s: not tried at this load, since it is large; check_engines=True tries it", component, name)
    return {path for count, path in smallest.values() if count <= LARGEST}


def elements(region: Program) -> int:
    """Returns the number of elements in a region's values, weights included."""
    return sum(kind.numel for kind in region.types.values())
