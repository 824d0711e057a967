"""A region to lower, and what it is lowered to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.program import Program
from diffkiln.program.sizes import Family
from diffkiln.spec.targets import Target


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
