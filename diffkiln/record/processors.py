"""Attention processors and hooks that a pipeline gives to a component for the length of its call, and takes away
after it."""

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


def hooks_of(module: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Returns the forward hooks of every part that has some, by its path; not those by which transformers collects
    results."""
    found: dict[str, tuple[Any, ...]] = {}
    for path, part in module.named_modules():
        hooks = [hook for hook in part._forward_hooks.values() if not _is_collecting(hook)]
        found |= {path: tuple(hooks)} if hooks else {}
    return found


def _is_collecting(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


@contextlib.contextmanager
def with_hooks(module: torch.nn.Module, hooks: Mapping[str, tuple[Any, ...]]) -> Iterator[None]:
    """Gives parts the forward hooks of a call inside the `with` block, as Qwen-Image 2.1 has its text encoder give what
    its last norm takes."""
    with contextlib.ExitStack() as stack:
        for path, part in module.named_modules():
            for hook in hooks.get(path, ()):
                if hook not in part._forward_hooks.values():
                    stack.enter_context(part.register_forward_hook(hook))  # type: ignore[arg-type]
        yield
