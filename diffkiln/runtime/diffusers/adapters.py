"""Adapters that diffusers itself loads into a bundle's modules: what it would leave out without a word is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from diffkiln.bundle import AppliedPass
from diffkiln.errors import CallError
from diffkiln.interpreter.adapters import parse
from diffkiln.runtime.diffusers.building import pass_of

_HINT = (
    "Load the bundle without as_diffusers and use its load_lora, or add the adapter in the spec, by the pass fuse_lora"
)


def guard_adapters(module: torch.nn.Module, name: str, passes: Iterable[AppliedPass]) -> None:
    """Makes a module's `load_lora_adapter` refuse an adapter of layers that the bundle's passes removed or renamed.

    diffusers loads what it finds of an adapter and leaves out the rest, such as projections that were fused.

    Args:
        module: A component of the pipeline.
        name: The component's name.
        passes: The bundle's.
    """
    load = getattr(module, "load_lora_adapter", None)
    if not callable(load):
        return
    own = (row for row in passes if row.changed and row.options.get("component") == name)
    moved = [row.name for row in own if pass_of(row).moves_layers]
    module.__dict__["load_lora_adapter"] = _guarded(load, module, name, moved)


def _guarded(load: Callable[..., Any], module: torch.nn.Module, name: str, moved: list[str]) -> Callable[..., Any]:
    @functools.wraps(load)
    def guarded(state: Any, prefix: str | None = "transformer", **options: Any) -> Any:
        layers = _layers(state, prefix) if isinstance(state, Mapping) else []
        if layers and moved:
            raise CallError(
                f"load_lora_weights: the pass {moved[0]} gave layers of {name} other names, so this adapter would be "
                "added to the wrong ones. Put it into the spec, by the pass fuse_lora"
            )
        if lost := [layer for layer in layers if not _has(module, layer)]:
            raise CallError(
                f"load_lora_weights: {len(lost)} of the {len(layers)} layers that this adapter changes are not in "
                f"{name}, such as {lost[0]}: passes fused or removed them, and diffusers would leave them out. {_HINT}"
            )
        return load(state, prefix=prefix, **options)

    return guarded


def _layers(state: Mapping[str, Any], prefix: str | None) -> list[str]:
    """Returns the layers of one component that an adapter's tensors name."""
    begin = f"{prefix}." if prefix else ""
    names = (parse(key.removeprefix(begin), ()) for key in state if key.startswith(begin))
    return list(dict.fromkeys(named.layer for named in names if named is not None and not named.underscored))


def _has(module: torch.nn.Module, layer: str) -> bool:
    try:
        return isinstance(module.get_submodule(layer), torch.nn.Module)
    except AttributeError:
        return False
