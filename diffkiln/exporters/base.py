"""What an exporter gets and what it gives.

An exporter lowers one region for one target into an *engine*: a directory of files that a backend in
`diffkiln.runtime.engines` loads. Weights and constants are the engine's inputs, so one engine serves every block with
the same region, and none of them is needed to build it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.bundle.scratch import scratch
from diffkiln.errors import ExportError, Problem
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache, engine_key
from diffkiln.program import ATTENTION, Program, TensorType, engine_types
from diffkiln.spec.targets import Target


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


def export_once(
    backend: Exporter,
    lowering: Lowering,
    cache: EngineCache,
    tools: Callable[[], Mapping[str, str]],
    build: Callable[[Path], Artefact],
) -> Artefact:
    """The engine of a lowering: from the cache, or built in an empty folder and put there.

    Args:
        backend: says what stands in the way.
        tools: the programs that build it, with their versions.
        build: builds it in the folder that it is given.

    Raises:
        ExportError: names the region, the reason and the mend.
    """
    refused = f"the region {lowering.region.name!r} cannot be lowered by {backend.name}:"
    if problems := backend.check(lowering.region, lowering.target, lowering.options):
        raise ExportError("\n".join([refused, *map(str, problems)]), problems=problems)
    key = engine_key(backend.name, backend.version, lowering, tools())
    if (found := cache.get(key)) is not None:
        return found
    try:
        with scratch("export") as folder:
            return cache.put(key, build(folder))
    except ExportError as error:
        raise ExportError(f"{refused} {error}") from error
