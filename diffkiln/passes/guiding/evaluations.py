"""Whether a denoiser is evaluated a second time for guidance, and its programs at another batch."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.passes.base import State
from diffkiln.record.batches import rebatch
from diffkiln.record.pipeline import Rebatched, Recording


def are_pairs(sites: Sequence[tuple[int, ...]]) -> bool:
    """Returns True if every step has two calls."""
    return bool(sites) and all(len(step) == 2 for step in sites)


def rebatched(recording: Recording, component: str, double: bool) -> tuple[Recording, Mapping[str, Rebatched]]:
    """Records a component at twice its batch, or at half of it.

    Raises:
        ValueError: it cannot be called so; says why.
    """
    try:
        return rebatch(recording, component, double=double)
    except RecordError as error:
        which = "a doubled batch" if double else "half of a doubled batch"
        raise ValueError(f"{component} cannot be called with {which}: {error}") from error


def no_second_evaluation(module: torch.nn.Module, state: State) -> str:
    """Returns why the denoiser is not evaluated a second time for guidance; "" if it may be."""
    config = getattr(module, "config", {})
    kind = getattr(importlib.import_module("diffusers"), state.class_name, None)
    parameters = inspect.signature(kind.__call__).parameters if kind is not None else {}
    true = [_scale(variant, parameters, "true_cfg_scale") for variant in state.variants]
    if config.get("time_cond_proj_dim") is not None:
        return "is distilled: it is given the guidance scale (time_cond_proj_dim), and is evaluated once a step"
    if config.get("guidance_embeds") and not any(scale > 1 for scale in true):
        return "is distilled: it is given the guidance scale (guidance_embeds), and is evaluated once a step"
    if "true_cfg_scale" in parameters and not any(scale > 1 for scale in true):
        return "is not guided: true_cfg_scale is at most 1"
    scales = [_scale(variant, parameters, "guidance_scale") for variant in state.variants]
    turned_off = kind is not None and re.search(r"guidance_scale > 1", inspect.getsource(kind))
    if turned_off and "true_cfg_scale" not in parameters and not any(scale > 1 for scale in scales):
        return "is not guided: guidance_scale is at most 1, which turns guidance off"
    return ""


def _scale(variant: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], name: str) -> float:
    """Returns the scale of a variant, or the pipeline's default; 0 if there is none."""
    given = variant.get(name, parameters[name].default if name in parameters else None)
    return float(given) if isinstance(given, int | float) else 0.0
