"""Calls whose shapes follow the prompt's length, recorded at a fixed one.

`fixed_lengths` replaces the methods concerned while a call or a component is recorded. What the rewrites claim is
verified at every build (diffkiln.compiler.verify): the call bit for bit, components within rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.record.lengths import (
    bria,
    bria_fibo,
    cogview4,
    ernie_image,
    kandinsky3,
    kandinsky5,
    latte,
    longcat_image,
    lumina,
    lumina2,
    mochi,
    qwen_image,
    qwen_image_edit,
    qwen_vl,
    wan,
    z_image,
)
from diffkiln.record.lengths.rewriting import Padding, Rewrite, fingerprint, replaced, whole
from diffkiln.record.processors import processors_of

_FAMILIES: tuple[Any, ...] = (
    wan,
    qwen_image,
    qwen_image_edit,
    qwen_vl,
    lumina2,
    z_image,
    mochi,
    cogview4,
    lumina,
    bria,
    latte,
    kandinsky3,
    bria_fibo,
    ernie_image,
    longcat_image,
    kandinsky5,
)
REWRITES: tuple[Rewrite, ...] = tuple(rewrite for family in _FAMILIES for rewrite in family.REWRITES)

#: Those that give the components of their pipelines other arguments than diffusers does.
_PADDED = tuple(family for family in _FAMILIES if hasattr(family, "paddings"))


def fixed_lengths() -> contextlib.AbstractContextManager[None]:
    """While it lasts, the methods whose shapes follow the prompt's length have a fixed one."""
    return replaced(REWRITES)


def paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """The components of a pipeline that its program calls with other arguments than diffusers does.

    Args:
        pipe: the pipeline.
        fixed: the keywords of its call, with defaults.
    """
    for family in _PADDED:
        if any(type(pipe) in rewrite.classes() for rewrite in family.REWRITES):
            return family.paddings(pipe, fixed)
    return {}


def is_rewritten(module: torch.nn.Module) -> bool:
    """Whether `fixed_lengths` replaces a method of a component, or of an attention processor in it."""
    classes = _classes(module)
    return any(owner in classes and rewrite.fits(owner) for rewrite, owner in _owners())


def of_fixed_length(pipe: Any, fixed: Mapping[str, Any]) -> set[str]:
    """The components that a program calls at another length than diffusers, or that compute at another one.

    Not those in which only the attention differs: their blocks are called as diffusers calls them.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    owners = {owner for rewrite, owner in _owners() if rewrite.fits(owner)}
    own = {name for name, module in modules.items() if not owners.isdisjoint(type(module).__mro__)}
    return own | paddings(pipe, fixed).keys()


def outdated(pipe: Any) -> str:
    """The methods of a pipeline and its components that have a rewrite, made for another text of them, such as
    "diffusers' WanPipeline.encode_prompt"; "" if there are none."""
    parts = [pipe, *pipe.components.values()]
    parts += [inner for part in parts if isinstance(part, torch.nn.Module) for inner in part.modules()]
    classes = {base for part in parts for base in _classes(part)}
    return ", ".join(
        f"{rewrite.library}' {owner.__name__}.{rewrite.method}"
        for rewrite, owner in _owners()
        if owner in classes and not rewrite.refuses and not rewrite.fits(owner)
    )


def _classes(part: Any) -> set[type]:
    """What a pipeline or a component is an instance of, and what the attention processors in it are."""
    processors = processors_of(part).values() if isinstance(part, torch.nn.Module) else ()
    return {base for each in (part, *processors) for base in type(each).__mro__}


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
