"""Which of a bundle's targets this machine uses: an exact match first, then the best that fits, and why not the others.

For a CPU the targets are levels of x86-64, each of which includes those below. For a GPU they are compute capabilities,
where what was compiled is of two kinds. A *cubin* runs on its own capability, and on later minor versions of the same
major; one for `sm_90a` runs on its own alone, and one for `sm_100f` on its family, the same major. *PTX* is compiled by
the driver for its own capability and every later one, but not where it is of those special kinds, and only where the
bundle says that it is there. Source: CUDA C++ Programming Guide, "Compute Capability" and "Application Compatibility".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffkiln.bundle import Manifest, device_of, devices_of, engine_targets
from diffkiln.errors import Incompatible
from diffkiln.guards.printable import get_logger
from diffkiln.runtime.accelerator import indexed
from diffkiln.runtime.compatibility import ISA_FLAGS, capability, check_target, missing_flags

log = get_logger(__name__)

_SM = re.compile(r"(?:sm|compute)_(\d{1,2})(\d)([af]?)")

#: How well a target fits: exactly, by a cubin for an earlier minor version, by PTX. The higher the better.
EXACT, SAME_MAJOR, PTX = 2, 1, 0


@dataclass(frozen=True)
class Choice:
    """The target whose engines this machine uses, with reasons for and against each.

    `target` is None if the bundle has no engines.
    """

    target: str | None
    why: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.why}", *(f"not {name}: {why}" for name, why in self.others.items())]
        return "; ".join(line.replace("\n", " ") for line in lines)


@dataclass(frozen=True)
class GpuFit:
    """The fit of engines for one GPU to another: `rank` is EXACT, SAME_MAJOR, PTX, or None; `number` orders equal
    ranks.
    """

    rank: int | None
    number: int
    why: str


def gpu_fit(found: tuple[int, int] | None, sm: str, ptx: str | None = None) -> GpuFit:
    """Returns how engines with a cubin for `sm`, and PTX for `ptx` if any, fit a GPU of the compute capability `found`.

    Args:
        found: (major, minor), such as (8, 9); None for a machine without a GPU.
        sm: "sm_90", "sm_90a" or "sm_100f".
        ptx: "compute_90", or None.
    """
    if found is None:
        return GpuFit(None, 0, f"gpu: found no CUDA GPU, required {sm}")
    here = f"sm_{found[0]}{found[1]}"
    major, minor, kind = _parsed(sm)
    number = major * 10 + minor
    if found == (major, minor):
        return GpuFit(EXACT, number, f"its {sm} is this GPU's own")
    if found[0] == major and found[1] > minor and kind != "a":
        return GpuFit(SAME_MAJOR, number, f"code for {sm} runs on this GPU, which is {here}")
    if ptx is not None:
        major, minor, kind = _parsed(ptx)
        if not kind and found >= (major, minor):
            return GpuFit(PTX, major * 10 + minor, f"the driver compiles its PTX, {ptx}, for this GPU, which is {here}")
        return GpuFit(None, 0, f"gpu: found {here}, required {sm}, and its PTX, {ptx}, is not portable to it")
    return GpuFit(None, 0, f"gpu: found {here}, required {sm}")


def own_level() -> str | None:
    """Returns the highest level of x86-64 that this CPU has; None below the lowest that diffkiln knows."""
    return max((level for level in ISA_FLAGS if not missing_flags(level)), default=None)


def choose(manifest: Manifest, device: torch.device, here: Collection[str] | None = None) -> Choice:
    """Returns the bundle's target that fits this machine best.

    Args:
        manifest: the bundle's.
        device: where to run.
        here: the targets whose engines are here; all of them by default.

    Raises:
        Incompatible: none fits; each is listed with found against required.
    """
    used = engine_targets(manifest)
    if not used:
        return Choice(None, "the bundle has no engines, and is replayed operation by operation")
    if device.type not in (built := devices_of(manifest)):
        listed = " or ".join(sorted(built))
        raise Incompatible(f"device: found {device}, required {listed}, which the bundle's engines are for")
    fits: dict[str, tuple[tuple[int, int], str]] = {}
    reasons: dict[str, str] = {}
    for name in used:
        if (kind := device_of(manifest, name)) != device.type:
            reasons[name] = f"device: found {device}, required {kind}"
            continue
        try:
            fits[name] = _fit(manifest, name)
        except Incompatible as error:
            reasons[name] = "\n".join(str(problem) for problem in error.problems) or str(error)
    missing = "its engines were left out when the bundle was pulled. Pull it again with them"
    reasons |= {name: missing for name in fits if here is not None and name not in here}
    best = max((name for name in fits if name not in reasons), key=lambda name: fits[name][0], default=None)
    if best is None:
        listed = (f"target {name}:\n" + "\n".join(f"  {line}" for line in reasons[name].splitlines()) for name in used)
        raise Incompatible("this machine fits none of the bundle's targets\n" + "\n".join(listed))
    others = {name: reasons.get(name, f"fits too, but not as well as {best}") for name in used if name != best}
    return Choice(best, fits[best][1], others)


def choose_target(manifest: Manifest, device: torch.device, here: Collection[str] | None = None) -> str | None:
    """Returns the name of the target that `choose` gives, and logs it."""
    choice = choose(manifest, device, here)
    if choice.target is not None:
        log.info("engines of the target %s", choice)
    return choice.target


def fitting_targets(manifest: Manifest, device: str | torch.device | None = None) -> tuple[str, ...]:
    """Returns the target whose engines `load` would use here; none if the bundle has none, or can do without.

    Raises:
        Incompatible: no target fits, and the bundle needs one.
    """
    try:
        target = choose_target(manifest, device_for(manifest, device))
    except Incompatible:
        if manifest.runtime.get("on_incompatible") != "eager":
            raise
        return ()
    return (target,) if target else ()


def device_for(manifest: Manifest, device: str | torch.device | None = None) -> torch.device:
    """Returns where a bundle runs: the caller's device, or else the targets' device; of two, a GPU that a target fits.

    A GPU comes with its number, so that it stays the same when the caller makes another one current.
    """
    if device is not None:
        return indexed(torch.device(device))
    devices = devices_of(manifest)
    if len(devices) == 1:
        return indexed(torch.device(*devices))
    if capability() is None:
        return torch.device("cpu")
    try:
        choose(manifest, torch.device("cuda"))
    except Incompatible as error:
        log.info("not on the GPU: %s", error)
        return torch.device("cpu")
    return indexed(torch.device("cuda"))


def check_device(manifest: Manifest, device: torch.device) -> None:
    """Refuses a bundle for a GPU on a machine without one, at once.

    Raises:
        Incompatible: in one sentence.
    """
    if device.type != "cuda" or "cuda" not in devices_of(manifest) or capability() is not None:
        return
    gpus = [name for name in engine_targets(manifest) if device_of(manifest, name) == "cuda"]
    names = ", ".join(f"{name} ({_gpu_of(manifest, name)[0]})" for name in gpus)
    raise Incompatible(
        f"gpu: found none that torch {torch.__version__} can use, required {names or 'a CUDA GPU'}, which this bundle "
        "is for: load it on such a machine, or compile its spec for the CPU"
    )


def _fit(manifest: Manifest, name: str) -> tuple[tuple[int, int], str]:
    """Returns how well the machine fits a target, higher is better, and the same in words. Raises `Incompatible`."""
    isas: Any = manifest.runtime.get("targets", {})
    level = str(isas.get(name, "")) or None
    sm, ptx = _gpu_of(manifest, name)
    row = _gpu_row(manifest, name)
    packages = {**manifest.requires.packages, **row.get("packages", {})}
    asked: dict[str, Any] = {"sm": None, "packages": packages}
    if device_of(manifest, name) == "cpu":  # what the engines for GPUs beside it ask is nothing to it
        asked |= {"cuda": None, "driver": None}
    check_target(manifest.requires.model_copy(update=asked), level, native=True)
    if device_of(manifest, name) == "cpu" or sm is None:
        own = own_level()
        exact = level == own
        why = f"its {level} is this CPU's own level" if exact else f"{level} is the highest here that this CPU has"
        return (EXACT if exact else SAME_MAJOR, list(ISA_FLAGS).index(level) if level in ISA_FLAGS else 0), why
    fit = gpu_fit(capability(), sm, ptx)
    if fit.rank is None:
        raise Incompatible(fit.why)
    if row.get("exact") and fit.rank != EXACT:
        raise Incompatible(f"gpu: required {sm}, which these engines are for and no other, but {fit.why}")
    return (fit.rank, fit.number), fit.why


def _gpu_of(manifest: Manifest, name: str) -> tuple[str | None, str | None]:
    """Returns the SM of the engines' cubins, and of their PTX if they have it."""
    row = _gpu_row(manifest, name)
    return row.get("sm", manifest.requires.sm), row.get("ptx")


def _gpu_row(manifest: Manifest, name: str) -> dict[str, Any]:
    """Returns the manifest's row for a target that is a GPU."""
    rows: Any = manifest.runtime.get("gpus", {})
    return rows.get(name, {})


def _parsed(text: str) -> tuple[int, int, str]:
    """Splits `sm_90a` into (9, 0, "a"). Raises `Incompatible` for a name that this diffkiln cannot read."""
    found = _SM.fullmatch(text)
    if found is None:
        raise Incompatible(f"gpu: required {text!r}, which this diffkiln cannot read. Install a later diffkiln")
    return int(found[1]), int(found[2]), found[3]
