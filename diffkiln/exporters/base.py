"""What an exporter gets and what it gives.

An exporter lowers one region for one target into an *engine*: a directory of files that a backend in
`diffkiln.runtime.engines` loads. Weights and constants are the engine's inputs, so one engine serves every block with
the same region, and none of them is needed to build it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import Problem
from diffkiln.program import ATTENTION, Program, TensorType, engine_types
from diffkiln.program.sizes import Family
from diffkiln.spec.targets import Target

if TYPE_CHECKING:
    from diffkiln.exporters.cache import EngineCache


@dataclass(frozen=True)
class Lowering:
    """One region to lower.

    `family` holds the regions that differ from it by sizes alone, itself first, where one engine is for all of them.
    `constants` holds the region's `#` constants by key, for backends that build them in; `options` are the compile
    pass's, already known to be JSON. `weights` holds the region's weights by name where the engine is to hold them
    itself, and nothing elsewhere.
    """

    region: Program
    target: Target
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    family: Family | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """A lowered region on disk.

    `inputs` are the region's inputs, then its weights in `Program.weights` order, then its constants in
    `Program.constants` order, all contiguous. `requires` is what the engine's files demand of the machine that loads
    them, such as {"glibc": "2.34", "glibcxx": "3.4.30"}; `packages` are those that run them, with a version specifier.
    `autotuned` says whether kernels were chosen by running them on the target's GPU; None where there is nothing to
    choose. `exact` says that they run on the target's SM and on no later one.
    """

    backend: str
    directory: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    autotuned: bool | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False


class Exporter(Protocol):
    """A backend. `version` changes whenever the same lowering would give other files; it is part of the cache's key."""

    name: ClassVar[str]
    version: ClassVar[int]

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> Sequence[Problem]:
        """What stands in the way, from the region and the target alone: nothing is compiled."""
        ...

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        """The engine, from the cache where it has it. May be called from several threads at once.

        Raises:
            ExportError: names the region, the reason and the mend.
        """
        ...


def engine_inputs(region: Program) -> tuple[TensorType, ...]:
    """The types of an engine's inputs in their order."""
    return tuple(engine_types(region).values())


def contiguous(type_: TensorType) -> TensorSpec:
    """The layout of a contiguous tensor of this type."""
    stride = tuple(math.prod(max(size, 1) for size in type_.shape[i + 1 :]) for i in range(len(type_.shape)))
    return TensorSpec(dtype=type_.dtype, shape=type_.shape, stride=stride)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The layout of a tensor, which may be fake."""
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), stride=tuple(tensor.stride())
    )


def foreign(region: Program) -> list[str]:
    """What of a region is not an ATen operator, each once: "attention by sage"."""
    ops = [op for op in region.ops if not op.is_aten]
    return sorted({f"{op.name} by {op.attrs['kernel']}" if op.name == ATTENTION else op.name for op in ops})


def foreign_operators(region: Program) -> list[Problem]:
    """A problem where a region is not made of ATen operators alone."""
    found = foreign(region)
    reason = f"the region {region.name!r} is not operators alone: {', '.join(found)}"
    return [Problem("", reason)] if found else []


def unknown_options(options: Mapping[str, Any], known: Iterable[str]) -> list[Problem]:
    """A problem for each option that the backend does not have."""
    names = sorted(known)
    mend = f"It takes {', '.join(names)}." if names else "It takes none."
    return [Problem(f"$.{name}", "the backend has no such option", mend) for name in options if name not in names]
