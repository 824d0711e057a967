"""Does this machine fit? Decided before any native code is loaded; every difference is found against required."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import chain

import torch

from diffkiln.bundle import Manifest, Requires, sha256_bytes
from diffkiln.bundle.versions import fits, numbers
from diffkiln.errors import Incompatible, MissingDependency, Problem
from diffkiln.program.attention import install_line
from diffkiln.runtime.accelerator import capability, model
from diffkiln.runtime.engines import stand_ins
from diffkiln.version import __version__

#: The levels of the x86-64 psABI and the flags of /proc/cpuinfo that each adds to the one before.
ISA_FLAGS: dict[str, frozenset[str]] = {
    "x86-64-v2": frozenset(["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"]),
    "x86-64-v3": frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
    "x86-64-v4": frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
}


def missing_flags(isa: str) -> list[str]:
    """Returns the CPU features that the level demands and this CPU lacks."""
    present = _cpu_flags()
    missing: list[str] = []
    for level, flags in ISA_FLAGS.items():
        missing += sorted(flags - present)
        if level == isa:
            return missing
    return [f"unknown level {isa}"]


def check_target(requires: Requires, isa: str | None, native: bool) -> None:
    """Compares the machine with the needs of a bundle's engines for one target.

    Args:
        requires: the manifest's.
        isa: the CPU level of the engines; None when there are none.
        native: whether native code will be loaded; without it torch's version and the CPU do not matter.

    Raises:
        Incompatible: all differences together; MissingDependency where they are of packages alone.
    """
    problems = list(_differences(requires, isa, native))
    if problems:
        kind = MissingDependency if all(problem.where in requires.packages for problem in problems) else Incompatible
        raise kind("this machine does not fit the bundle:\n" + "\n".join(map(str, problems)), problems=problems)


def _differences(requires: Requires, isa: str | None, native: bool) -> Iterator[Problem]:
    yield from _version("python", platform.python_version(), requires.python)
    if requires.os != sys.platform and native:
        yield Problem("os", f"found {sys.platform}, required {requires.os}")
    if native:
        if requires.machine != platform.machine():
            yield Problem("machine", f"found {platform.machine()}, required {requires.machine}")
        yield from _version(
            "torch", torch.__version__.split("+")[0], requires.torch, "Install that torch or compile again"
        )
        if isa and (lacking := missing_flags(isa)):
            yield Problem(
                "cpu_isa", f"found a CPU without {', '.join(lacking)}, required {isa}", "Compile for this CPU's level"
            )
        if requires.glibc and (found := _glibc()) and numbers(found) < numbers(requires.glibc):
            yield Problem("glibc", f"found {found}, required {requires.glibc} or later")
        yield from _cuda_differences(requires)
    if requires.sm:
        found = _sm()
        if found != requires.sm:
            yield Problem(
                "gpu", f"found {found or 'no CUDA GPU'}, required {requires.sm}", "Compile for this GPU's target"
            )
    for package, wanted in requires.packages.items():
        found = _installed(package)
        if found is None:
            yield Problem(package, f"found nothing, required {wanted or 'any version'}", install_line(package))
        else:
            yield from _version(package, found, wanted, install_line(package))


def _cuda_differences(requires: Requires) -> Iterator[Problem]:
    """Yields differences of CUDA's major version, which engines are linked to, and of the driver, which must know their
    code.
    """
    if requires.cuda:
        found = torch.version.cuda
        if found is None or numbers(found)[0] != numbers(requires.cuda)[0]:
            build = f"a torch built for {found}" if found else "a torch built without CUDA"
            yield Problem("cuda", f"found {build}, required {requires.cuda}", "Install that torch or compile again")
    if requires.driver and (found := _driver()) and numbers(found) < numbers(requires.driver):
        yield Problem("driver", f"found {found}, required {requires.driver} or later", "Update the NVIDIA driver")


def check_manifest(manifest: Manifest) -> None:
    """Checks what every load needs: Python and packages."""
    check_target(manifest.requires, None, native=False)


def machine(requires: Requires, device: torch.device) -> dict[str, str]:
    """Returns what decides how an engine computes here, besides the bundle: processors and versions."""
    facts = {"diffkiln": __version__, "torch": torch.__version__, "device": str(device), "cpu": _cpu()}
    facts |= {package: _installed(package) or "" for package in requires.packages}
    if device.type == "cuda":
        facts |= {"gpu": model(device), "driver": _driver() or ""}
        facts["cuda"] = torch.version.cuda or ""
    return facts


def _cpu() -> str:
    """Returns the CPU's model, the level that torch runs at, and a digest of the CPU's flags."""
    stated: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                stated.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = sha256_bytes(stated.get("flags", "").encode())
    return f"{stated.get('model name', 'unknown')} {torch.backends.cpu.get_cpu_capability()} {flags}"


def _version(what: str, found: str, wanted: str, hint: str = "") -> Iterator[Problem]:
    try:
        if not fits(found, wanted):
            yield Problem(what, f"found {found}, required {wanted}", hint)
    except ValueError:
        yield Problem(what, f"required {wanted!r}, which this diffkiln cannot read", "Install a later diffkiln")


def _installed(package: str) -> str | None:
    """Returns the version of a package, or of another distribution that brings the same module."""
    for name in chain((package,), stand_ins(package)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _glibc() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").split()[-1]  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return None


def _driver() -> str | None:
    """Returns the NVIDIA driver's version; None if there is none, or it does not say."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", file.readline())
    except OSError:
        return None
    return found[0] if found else None


def _sm() -> str | None:
    found = capability()
    return f"sm_{found[0]}{found[1]}" if found else None
