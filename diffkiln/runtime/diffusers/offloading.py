"""diffusers' group offloading, as a bundle asks for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from diffkiln.bundle.scratch import Scratch
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

_GROUPS = "group_offloading"


def to_disk(device: torch.device, offload: Any) -> bool:
    """Returns True if weights lie in files between their uses."""
    default = "host" if device.type == "cuda" else "disk"
    return offload is not None and offload.get("to", default) == "disk"


def enable_offload(pipe: Any, device: torch.device, how: Any) -> None:
    """Enables diffusers' group offloading by component: in one folder their files would have the same names."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    options: dict[str, Any] = {
        "onload_device": device,
        "offload_device": torch.device("cpu"),
        "offload_type": how["type"],
        "num_blocks_per_group": int(how["num_blocks_per_group"]),
        "use_stream": bool(how.get("use_stream")) and device.type == "cuda",
    }
    root = None
    if to_disk(device, how):
        made = Scratch("offload")
        root = made.path
        weakref.finalize(pipe, made.remove)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            options["offload_to_disk_path"] = str(root / name) if root else None
            own: Any = getattr(module, "enable_group_offload", None)
            if own is not None:
                own(**options)
            else:
                apply_group_offloading(module, **options)
            if root is not None:
                _bring_back_on_removal(name, module)


def _bring_back_on_removal(name: str, component: torch.nn.Module) -> None:
    """Has weights come back from their files before diffusers takes the hooks away, and stay in memory from then on.

    diffusers takes hooks away and puts them on anew where an adapter changes a component. Its new groups would write
    nothing, since there are files of the same names, and then read from them tensors that they do not hold (a
    KeyError); and an adapter that is fused would be added to the empty memory in the weights' place.
    """
    from diffusers.hooks.hooks import HookRegistry

    registry: Any = HookRegistry.check_if_exists_or_initialize(component)
    remove = registry.remove_hook

    def removed(hook: str, recurse: bool = True) -> None:
        hooks = list(_group_hooks(component)) if hook == _GROUPS else []
        for item in hooks:
            if item.config.offload_to_disk_path is not None:
                item.group.onload_()
        for item in hooks:
            item.config.offload_to_disk_path = None
        if hooks:
            registry.remove_hook = remove
            log.warning("%s stays in memory from now on: it is changed, and its files hold what it was", name)
        remove(hook, recurse)

    registry.remove_hook = removed


def _group_hooks(component: torch.nn.Module) -> Iterator[Any]:
    for part in component.modules():
        registry: Any = getattr(part, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(_GROUPS)) is not None:
            yield hook
