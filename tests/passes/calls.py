"""How a pipeline calls its denoiser, and what a changed module gives for that call, as it is and as a program."""

from __future__ import annotations

import contextlib
import warnings
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.compiler.verify import compare_component
from diffkiln.models.meta import make_fake
from diffkiln.program import Module
from diffkiln.record.components import Callee, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.structure import flatten, unflatten
from tests.pipelines import FAMILIES


class _Seen(Exception):
    """The call that was waited for."""


@cache
def call_of(family: str, component: str) -> tuple[list[Any], Any]:
    """The flattened arguments of the component's first call in the family's pipeline."""
    pipe = FAMILIES[family].build()
    seen: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        raise _Seen

    getattr(pipe, component).forward = forward
    with contextlib.suppress(_Seen), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries themselves
        pipe(prompt="a prompt", generator=torch.Generator().manual_seed(0), **FAMILIES[family].call)
    return flatten(seen[0])


def cast(leaves: list[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments with their floating tensors in another type."""
    return [leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]


def result_of(module: torch.nn.Module, leaves: list[Any], structure: Any) -> torch.Tensor:
    """The first tensor that the module gives, as float32."""
    args, kwargs = unflatten(list(leaves), structure)
    with torch.inference_mode():
        found = flatten(module(*args, **kwargs))[0]
    return next(leaf for leaf in found if isinstance(leaf, torch.Tensor)).float()


def replays(ghost: torch.nn.Module, module: torch.nn.Module, leaves: list[Any], structure: Any) -> Module:
    """The component's program, which gives bit for bit what the module gives; raises VerifyError if it does not."""
    constants, fake = Constants(), FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(ghost, fake)
    callee = Callee("tried", "forward", ghost, ghost.forward, leaves, structure, ([], None))
    recorded = record_component([callee], fake, constants)
    compare_component(callee, module, recorded, leaves, constants.tensors)
    return recorded


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2."""
    return float((found - wanted).norm() / wanted.norm())
