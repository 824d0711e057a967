"""Calls whose shapes follow the prompt's length, recorded at a fixed one.

`fixed_lengths` replaces the methods concerned while a call or a component is recorded. What the rewrites claim is
verified at every build (diffkiln.verification): the call bit for bit, components within rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffkiln.record.lengths import lumina2, qwen_image, wan, z_image
from diffkiln.record.lengths.rewriting import Padding, Rewrite, fingerprint, replaced, whole

REWRITES: tuple[Rewrite, ...] = (*wan.REWRITES, *qwen_image.REWRITES, *lumina2.REWRITES, *z_image.REWRITES)

#: pipeline class → what its components are given, from the pipeline and the fixed keywords of its call
_PADDINGS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Padding]]] = {
    "QwenImagePipeline": qwen_image.paddings,
    "ZImagePipeline": z_image.paddings,
}


def fixed_lengths() -> contextlib.AbstractContextManager[None]:
    """While it lasts, the methods whose shapes follow the prompt's length have a fixed one."""
    return replaced(REWRITES)


def paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """The components of a pipeline that its program calls with other arguments than diffusers does.

    Args:
        pipe: the pipeline.
        fixed: the keywords of its call, with defaults.
    """
    made = _PADDINGS.get(type(pipe).__name__)
    return made(pipe, fixed) if made else {}


def is_rewritten(module: torch.nn.Module) -> bool:
    """Whether `fixed_lengths` replaces a method of a component."""
    return any(owner in type(module).__mro__ and rewrite.fits(owner) for rewrite, owner in _owners())


def of_fixed_length(pipe: Any, fixed: Mapping[str, Any]) -> set[str]:
    """The components that a program calls at another length than diffusers, or that compute at another one."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name for name, module in modules.items() if is_rewritten(module)} | paddings(pipe, fixed).keys()


def outdated(pipe: Any) -> str:
    """The methods of a pipeline and its components that have a rewrite, made for another text of them; "" if none."""
    classes = {base for part in (pipe, *pipe.components.values()) for base in type(part).__mro__}
    names = [f"{o.__name__}.{rewrite.method}" for rewrite, o in _owners() if o in classes and not rewrite.fits(o)]
    return ", ".join(names)


def _owners() -> list[tuple[Rewrite, type]]:
    return [(rewrite, owner) for rewrite in REWRITES for owner in rewrite.classes()]


__all__ = [
    "REWRITES",
    "Padding",
    "Rewrite",
    "fingerprint",
    "fixed_lengths",
    "is_rewritten",
    "of_fixed_length",
    "outdated",
    "paddings",
    "whole",
]
