"""Families of models: one file or folder each, for what is true of that family alone.

A family whose shapes do not follow the prompt, and of which no architecture is known by name, needs no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffkiln.models.known_parts import Architecture
from diffkiln.record.patches import Patch


@dataclass(frozen=True)
class Family:
    """The facts of one model family; its file has one as `PLUGIN`.

    Attributes:
        patches: its methods at a fixed length, where their shapes follow the prompt's.
        architectures: its published models by the names that specs have for them.
        tokenizers: by the name of a class that the tokenizers library does not back: what makes one of that library
            of it.
        pipelines: "module:Class" of pipelines that diffusers has not. The package that brings the family brings them.
    """

    patches: tuple[Patch, ...] = ()
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    pipelines: tuple[str, ...] = ()
    tokenizers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
