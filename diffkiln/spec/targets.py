"""The machines that diffkiln knows by name, and what a target of the spec comes to.

Numbers of a GPU are those of NVIDIA's public data sheets; memory is taken in decimal GB, which is never more than the
card has. The link is the slot's own ceiling in one direction, PCI Express after 128b/130b encoding; real copies
stay below it. Cards with an Arm host (Grace, Jetson) are left out while `isa` knows only x86-64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from diffkiln.errors import Problem, SpecError
from diffkiln.guards.spelling import nearest
from diffkiln.spec.model import Isa, Spec, TargetSpec
from diffkiln.spec.problems import show
from diffkiln.spec.strict import MAX_ITEMS

DEFAULT_ISA: Isa = "x86-64-v3"

_V1 = frozenset(["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"])
_V2 = _V1 | frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])

CPU_FLAGS: Mapping[str, frozenset[str]] = MappingProxyType({"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4})
"""What each level of the x86-64 psABI (table "Micro-Architecture Levels") demands, as /proc/cpuinfo spells it:
`pni` is SSE3, `abm` is LZCNT, `lahf_lm` is LAHF and SAHF, `cx16` is CMPXCHG16B, and `xsave` stands for OSXSAVE, which
Linux does not list. A level includes those below it."""


@dataclass(frozen=True, slots=True)
class Target:
    """The machine that a bundle is for. Sizes in bytes, bandwidths in bytes a second; None is not known."""

    name: str
    device: Literal["cuda", "cpu"]
    isa: Isa = DEFAULT_ISA
    """Instruction set of the CPU, which for a GPU is the host's."""
    architecture: str | None = None
    compute_capability: str | None = None
    memory_bytes: int | None = None
    memory_bandwidth: float | None = None
    h2d_bandwidth: float | None = None
    """From host to GPU, one direction."""
    peer_bandwidth: float | None = None
    """From one such GPU to another of the machine, one direction."""
    half_flops: float | None = None
    """Additions and multiplications a second in tensor cores: operands of 16 bits, sums of 32, nothing sparse."""
    driver: str | None = None
    """Oldest driver that the spec asks for."""
    cuda: str | None = None
    """Oldest CUDA version that the spec asks for."""

    @property
    def capability(self) -> tuple[int, int]:
        """Returns the compute capability as numbers, such as (8, 9); (0, 0) for a CPU."""
        major, _, minor = (self.compute_capability or "0.0").partition(".")
        return int(major), int(minor)

    @property
    def sm(self) -> str | None:
        """Returns `sm_89` for compute capability 8.9; None for a CPU."""
        return f"sm_{self.compute_capability.replace('.', '')}" if self.compute_capability else None


_ARCHITECTURES = {
    "7.0": "Volta",
    "7.5": "Turing",
    "8.0": "Ampere",
    "8.6": "Ampere",
    "8.7": "Ampere",
    "8.9": "Ada",
    "9.0": "Hopper",
    "10.0": "Blackwell",
    "10.3": "Blackwell",
    "12.0": "Blackwell",
}

# One direction, GB/s: transfers a second in 10^9, times branches, times 128/130, over 8 bits.
_PCIE3_X16 = 8 * 16 * 128 / 130 / 8
_PCIE4_X8 = 16 * 8 * 128 / 130 / 8
_PCIE4_X16 = 16 * 16 * 128 / 130 / 8
_PCIE5_X8 = 32 * 8 * 128 / 130 / 8
_PCIE5_X16 = 32 * 16 * 128 / 130 / 8

# Name: (compute capability, memory in GB, its bandwidth in GB/s, host link in GB/s).
_GPUS: dict[str, tuple[str, float, float, float]] = {
    "nvidia-t4": ("7.5", 16, 320, _PCIE3_X16),
    "nvidia-rtx-2080-ti": ("7.5", 11, 616, _PCIE3_X16),
    "nvidia-a10": ("8.6", 24, 600, _PCIE4_X16),
    "nvidia-a30": ("8.0", 24, 933, _PCIE4_X16),
    "nvidia-a40": ("8.6", 48, 696, _PCIE4_X16),
    "nvidia-a100-40gb": ("8.0", 40, 1555, _PCIE4_X16),
    "nvidia-a100-80gb-pcie": ("8.0", 80, 1935, _PCIE4_X16),
    "nvidia-a100-80gb-sxm": ("8.0", 80, 2039, _PCIE4_X16),
    "nvidia-rtx-a5000": ("8.6", 24, 768, _PCIE4_X16),
    "nvidia-rtx-a6000": ("8.6", 48, 768, _PCIE4_X16),
    "nvidia-rtx-3060-12gb": ("8.6", 12, 360, _PCIE4_X16),
    "nvidia-rtx-3080-10gb": ("8.6", 10, 760, _PCIE4_X16),
    "nvidia-rtx-3090": ("8.6", 24, 936, _PCIE4_X16),
    "nvidia-l4": ("8.9", 24, 300, _PCIE4_X16),
    "nvidia-l40": ("8.9", 48, 864, _PCIE4_X16),
    "nvidia-l40s": ("8.9", 48, 864, _PCIE4_X16),
    "nvidia-rtx-6000-ada": ("8.9", 48, 960, _PCIE4_X16),
    "nvidia-rtx-4060-ti-8gb": ("8.9", 8, 288, _PCIE4_X8),
    "nvidia-rtx-4060-ti-16gb": ("8.9", 16, 288, _PCIE4_X8),
    "nvidia-rtx-4070": ("8.9", 12, 504, _PCIE4_X16),
    "nvidia-rtx-4070-ti": ("8.9", 12, 504, _PCIE4_X16),
    "nvidia-rtx-4070-ti-super": ("8.9", 16, 672, _PCIE4_X16),
    "nvidia-rtx-4080": ("8.9", 16, 716.8, _PCIE4_X16),
    "nvidia-rtx-4080-super": ("8.9", 16, 736, _PCIE4_X16),
    "nvidia-rtx-4090": ("8.9", 24, 1008, _PCIE4_X16),
    "nvidia-h100-pcie": ("9.0", 80, 2000, _PCIE5_X16),
    "nvidia-h100-sxm": ("9.0", 80, 3350, _PCIE5_X16),
    "nvidia-h100-nvl": ("9.0", 94, 3900, _PCIE5_X16),
    "nvidia-h200": ("9.0", 141, 4800, _PCIE5_X16),
    "nvidia-b200": ("10.0", 180, 8000, _PCIE5_X16),
    "nvidia-rtx-5060-ti-16gb": ("12.0", 16, 448, _PCIE5_X8),
    "nvidia-rtx-5070": ("12.0", 12, 672, _PCIE5_X16),
    "nvidia-rtx-5070-ti": ("12.0", 16, 896, _PCIE5_X16),
    "nvidia-rtx-5080": ("12.0", 16, 960, _PCIE5_X16),
    "nvidia-rtx-5090": ("12.0", 32, 1792, _PCIE5_X16),
    "nvidia-rtx-pro-6000-blackwell": ("12.0", 96, 1792, _PCIE5_X16),
}

# TFLOP/s of tensor cores with operands of 16 bits and sums of 32, nothing sparse. Data sheets; those of Hopper state
# twice as much, for sparse matrices. Of GeForce and RTX cards the appendices of NVIDIA's GA102, AD102 and GB202 papers.
_HALF_TFLOPS: dict[str, float] = {
    "nvidia-t4": 65,
    "nvidia-a10": 125,
    "nvidia-a30": 165,
    "nvidia-a40": 149.7,
    "nvidia-a100-40gb": 312,
    "nvidia-a100-80gb-pcie": 312,
    "nvidia-a100-80gb-sxm": 312,
    "nvidia-rtx-a6000": 154.8,
    "nvidia-rtx-3090": 71,
    "nvidia-l4": 121,
    "nvidia-l40s": 362,
    "nvidia-rtx-4090": 165.2,
    "nvidia-h100-pcie": 756,
    "nvidia-h100-sxm": 989,
    "nvidia-h200": 989,
    "nvidia-rtx-5090": 209.5,
}

# GB/s of NVLink in one direction, between any two GPUs of a machine whose board joins all of them. Data sheets, which
# state both directions together. Other cards exchange over the slot.
_NVLINK: dict[str, float] = {
    "nvidia-a100-80gb-sxm": 300,
    "nvidia-h100-sxm": 450,
    "nvidia-h200": 450,
    "nvidia-b200": 900,
}

# What the driver calls a card, where dropping the makers' words does not already lead to its name.
_ALIASES = {
    "a100sxm440gb": "nvidia-a100-40gb",
    "a100pcie40gb": "nvidia-a100-40gb",
    "a100sxm480gb": "nvidia-a100-80gb-sxm",
    "h10080gbhbm3": "nvidia-h100-sxm",
    "rtx6000adageneration": "nvidia-rtx-6000-ada",
    "rtxpro6000": "nvidia-rtx-pro-6000-blackwell",
    "rtxpro6000blackwellworkstationedition": "nvidia-rtx-pro-6000-blackwell",
    "rtxpro6000blackwellmaxqworkstationedition": "nvidia-rtx-pro-6000-blackwell",
}


def _gpu(name: str, capability: str, memory: float, bandwidth: float | None, link: float) -> Target:
    """Returns a GPU from numbers in GB and GB/s."""
    return Target(
        name=name,
        device="cuda",
        architecture=_ARCHITECTURES.get(capability),
        compute_capability=capability,
        memory_bytes=int(memory * 1e9),
        memory_bandwidth=bandwidth * 1e9 if bandwidth else None,
        h2d_bandwidth=link * 1e9,
        peer_bandwidth=_NVLINK.get(name, link) * 1e9,
        half_flops=_HALF_TFLOPS[name] * 1e12 if name in _HALF_TFLOPS else None,
    )


GPUS: Mapping[str, Target] = MappingProxyType({name: _gpu(name, *numbers) for name, numbers in _GPUS.items()})
"""Every GPU that has a name here."""

CPUS: Mapping[str, Target] = MappingProxyType({f"cpu-{isa}": Target(f"cpu-{isa}", "cpu", isa) for isa in get_args(Isa)})
"""Every CPU level that has a name here."""

TARGETS: Mapping[str, Target] = MappingProxyType({**GPUS, **CPUS})
"""Every named target: what `diffkiln targets` lists."""


def find_gpu(name: str) -> Target | None:
    """Returns the GPU of that name, also as people and drivers spell it: `RTX 4090`, `NVIDIA GeForce RTX 4090`."""
    return _BY_SPELLING.get(_squash(name))


def resolve_target(spec: TargetSpec, where: str = "$.target") -> Target:
    """Returns the machine that one entry of the spec means. Raises `SpecError` for an unknown GPU."""
    if spec.device == "cpu":
        return CPUS[f"cpu-{spec.isa}"]
    target = _written_out(spec, where) if spec.gpu is None else find_gpu(spec.gpu)
    if target is None:
        raise SpecError(problems=unknown_gpus({"gpu": spec.gpu}, where))
    # Targets that differ in the host's CPU are different targets, and the name is what tells them apart.
    name = target.name if spec.isa == DEFAULT_ISA else f"{target.name}-{spec.isa}"
    return replace(target, name=name, isa=spec.isa, driver=spec.driver, cuda=spec.cuda)


def resolve_targets(spec: Spec) -> tuple[Target, ...]:
    """Returns all machines of a spec, in its order. Raises `SpecError` with every unknown and every repeated target."""
    targets: list[Target] = []
    problems: list[Problem] = []
    for index, entry in enumerate(spec.targets):
        where = f"$.target[{index}]" if isinstance(spec.target, tuple) else "$.target"
        try:
            target = resolve_target(entry, where)
        except SpecError as error:
            problems.extend(error.problems)
            continue
        if target.name in [other.name for other in targets]:
            problems.append(Problem(where, f"{target.name} is listed twice", "Remove one of the two"))
        targets.append(target)
    if problems:
        raise SpecError(problems=problems)
    return tuple(targets)


def unknown_gpus(target: Any, where: str = "$.target") -> list[Problem]:
    """Returns the problems of GPU names in a target, or a list of targets, that mean no known GPU."""
    if isinstance(target, list | tuple):
        entries = [(entry, f"{where}[{index}]") for index, entry in enumerate(target[:MAX_ITEMS])]
    else:
        entries = [(target, where)]
    names = [(entry.get("gpu"), path) for entry, path in entries if isinstance(entry, dict)]
    return [
        Problem(f"{path}.gpu", f"{show(name)} is not a GPU that has a name here", _hint_gpu(name))
        for name, path in names
        if isinstance(name, str) and name and not find_gpu(name)
    ]


def _hint_gpu(name: str) -> str:
    """Returns the GPUs whose names continue `name` (`h100`), or else the nearest one."""
    squashed = _squash(name)
    meant = [known for known in GPUS if squashed and _squash(known).startswith(squashed)]
    if not meant and (near := nearest(squashed, _BY_SPELLING)):
        meant = [_BY_SPELLING[near].name]
    if meant:
        return f"Did you mean {' or '.join(map(show, meant))}?"
    return "`diffkiln targets` lists them; or write the numbers of the GPU out"


def _written_out(spec: TargetSpec, where: str) -> Target:
    capability, memory, link = spec.compute_capability, spec.memory_gb, spec.h2d_gb_per_s
    if capability is None or memory is None or link is None:  # the model does not let this through
        raise SpecError(problems=[Problem(where, "does not say which GPU")])
    name = f"cuda-sm_{capability.replace('.', '')}-{memory:g}gb"
    return _gpu(name, capability, memory, spec.memory_gb_per_s, link)


def _squash(name: str) -> str:
    """Returns a name without the words and marks that people put in or leave out."""
    return re.sub(r"[^a-z0-9]", "", _MAKERS_WORDS.sub("", name.lower()))


_MAKERS_WORDS = re.compile(r"nvidia|geforce|tesla|\(tm\)|\(r\)")
_BY_SPELLING = {_squash(name): gpu for name, gpu in GPUS.items()} | {
    spelling: GPUS[name] for spelling, name in _ALIASES.items()
}
