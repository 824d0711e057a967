"""Energy as drivers count it: processors' by Linux's powercap (RAPL, Intel's and AMD's), GPUs' by NVML.

A counter is of everything that a processor or GPU does, and not of one process. Root alone may read powercap's on most
machines; NVML has counters from Volta on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.runtime.accelerator import uuid_of

_POWERCAP = Path("/sys/class/powercap")
_ZONE = re.compile(r"intel-rapl:\d+")
_MICRO, _MILLI = 1e-6, 1e-3

#: Where energy is counted: the table's words for each.
SOURCES = {"cpu": "CPU energy", "gpu": "GPU energy"}


class Meter:
    """The counters of energy of this machine's processors and of one GPU, as far as they can be read.

    Args:
        device: what a pipeline runs on; a CPU has no GPU's counter.
        powercap: the folder of the kernel's counters.
    """

    def __init__(self, device: torch.device, powercap: Path = _POWERCAP) -> None:
        zones = [path for path in sorted(powercap.glob("intel-rapl:*")) if _ZONE.fullmatch(path.name)]
        self._packages = [path for path in zones if _is_package(path)]
        self._gpu = _gpu_counter(device)
        self._before = self._read()

    def start(self) -> None:
        """Begins to count."""
        self._before = self._read()

    def joules(self) -> dict[str, float]:
        """Returns the energy since `start` by source, in joules; without those that no driver tells."""
        after, found = self._read(), {}
        if self._packages:
            found["cpu"] = sum(self._spent(path, after) for path in self._packages)
        if self._gpu is not None:
            found["gpu"] = (after["gpu"] - self._before["gpu"]) * _MILLI
        return found

    def _spent(self, package: Path, after: Mapping[str, int]) -> float:
        """Returns the joules of a package. Its counter begins again at 0 above a maximum, every hour or so."""
        spent = after[package.name] - self._before[package.name]
        if spent < 0:
            spent += int((package / "max_energy_range_uj").read_text())
        return spent * _MICRO

    def _read(self) -> dict[str, int]:
        counts = {path.name: int((path / "energy_uj").read_text()) for path in self._packages}
        return counts if self._gpu is None else {**counts, "gpu": self._gpu()}


def _is_package(zone: Path) -> bool:
    """Returns True if a zone counts a whole processor, and may be read."""
    try:
        counted = all((zone / name).read_text().strip().isdecimal() for name in ("energy_uj", "max_energy_range_uj"))
        return counted and (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _gpu_counter(device: torch.device) -> Any:
    """Returns what reads a GPU's counter, in millijoules; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # no driver, a part of a GPU (MIG), or a GPU without a counter
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
