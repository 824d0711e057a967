"""Attention processors that a pipeline gives to a component for the length of its call, and takes away after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def processors_of(module: torch.nn.Module) -> dict[str, Any]:
    """Returns the processor of every attention of diffusers, by its path."""
    parts = ((path, getattr(part, "processor", None)) for path, part in module.named_modules())
    return {path: processor for path, processor in parts if processor is not None}


@contextlib.contextmanager
def with_processors(module: torch.nn.Module, processors: Mapping[str, Any]) -> Iterator[None]:
    """Gives attentions the processors of a call inside the `with` block.

    Perturbed attention guidance sets processors for a call and removes them again. Paths that the module lacks are left
    out.
    """
    parts = {path: part for path, part in module.named_modules() if path in processors}
    own = {path: part.processor for path, part in parts.items()}
    try:
        for path, part in parts.items():
            part.processor = processors[path]
        yield
    finally:
        for path, part in parts.items():
            part.processor = own[path]  # type: ignore[assignment]
