"""What has gone into a bundle so far, and how its JSON is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffkiln.bundle import EngineRow, GroupRow, Variant
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Offload


@dataclass
class Packed:
    """What has gone into the bundle so far, as far as the manifest has to tell."""

    recording: Recording
    offload: Offload | None
    notices: list[str]
    variants: list[Variant] = field(default_factory=list)
    engines: list[EngineRow] = field(default_factory=list)
    weights: dict[str, tuple[GroupRow, ...]] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    glibc: str | None = None
    cuda: str | None = None
    driver: str | None = None
    #: By target, what its engines hold for a GPU and the packages that run them: the manifest's `runtime.gpus`.
    gpus: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: The modules that were recorded, by component, so that an error can say where a region comes from.
    ghosts: Mapping[str, torch.nn.Module] = field(default_factory=dict)


def as_json(data: Any) -> bytes:
    """Indented, with sorted keys: files that people read."""
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
