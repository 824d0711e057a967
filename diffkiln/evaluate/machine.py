"""The machine and the versions that a number was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

import torch

from diffkiln.runtime import accelerator
from diffkiln.version import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "torchao", "accelerate")


def machine() -> dict[str, str]:
    """Returns the processor, the memory, the GPU, the load and the versions that matter, each as words."""
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": accelerator.model(torch.device("cuda")) if accelerator.available() else "none",
        "system": platform.platform(),
        "load": f"{os.getloadavg()[0]:.1f} when it began",
        "threads": str(torch.get_num_threads()),
    }
    return found | {"versions": ", ".join(_versions())}


def in_a_line(facts: Mapping[str, str]) -> str:
    """Returns what `machine` found as one paragraph."""
    kept = [facts[key] for key in ("processor", "memory") if key in facts]
    gpu = [facts["gpu"]] if facts.get("gpu", "none") != "none" else []
    return f"{', '.join([*kept, *gpu])}; {facts['versions']}; {facts['threads']} threads; load {facts['load']}"


def _versions() -> Iterator[str]:
    yield f"diffkiln {__version__}"
    yield f"Python {platform.python_version()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()
