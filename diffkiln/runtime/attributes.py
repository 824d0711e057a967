"""What the original pipeline has besides its call: what of it works on a compiled one, and why the rest is refused."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from diffkiln.errors import AttributeRefused, CallError
from diffkiln.guards.gate import gated
from diffkiln.runtime.executor import Executor

#: What to write instead, by patterns of names; the first that fits.
_HINTS = {
    "sched*": "Choose the scheduler in the spec, by the pass `scheduler`",
    "*lora*": "Adapters: `load_lora`, `set_adapters` and `unload_lora`, or the pass `fuse_lora` in the spec",
    "*adapter*": "Adapters: `load_lora`, `set_adapters` and `unload_lora`, or the pass `fuse_lora` in the spec",
    "*offload*": "Offloading is part of the spec: `offload` in `runtime`",
    "*vae_*": "Slices and tiles are part of the spec, by the pass `vae`",
    "*qkv*": "Fuse projections in the spec, by the pass `fuse_qkv`",
    "*attention*": "Choose attention in the spec, by the pass `attention_backend`",
    "*attn*": "Choose attention in the spec, by the pass `attention_backend`",
    "*guidance*": "Guidance does not change within a call: give `guidance_scale`, or use the pass `guidance`",
    "cuda": "Choose the device when you load: load(bundle, device=…)",
    "cpu": "Choose the device when you load: load(bundle, device=…)",
}
_ORIGINAL = "load(bundle, as_diffusers=True) gives the original pipeline"


def refused(name: str, done: str) -> AttributeError:
    """Returns the error for an attribute that a compiled pipeline does not have.

    Args:
        name: of the attribute.
        done: what cannot be done with it: "set" or "found".
    """
    if name.startswith("__"):  # Python asks for these by itself, and takes the plain error for an answer
        return AttributeError(name)
    hint = next((text for pattern, text in _HINTS.items() if fnmatchcase(name, pattern)), "")
    advice = f"{hint}; or {_ORIGINAL}" if hint else f"{_ORIGINAL}, if it has this"
    return AttributeRefused(f"{name} cannot be {done}: a compiled pipeline has no such attribute. {advice}")


def check_device(device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks what `pipe.to` is given: only the place where the pipeline is already.

    Raises:
        CallError: another device, or a dtype.
    """
    for value in (*args, *kwargs.values()):
        if value is None or isinstance(value, bool):
            continue  # silence_dtype_warnings
        try:
            asked = value if isinstance(value, torch.device) else torch.device(value)
        except (RuntimeError, TypeError):
            raise CallError(
                f"to: {reprlib.repr(value)} is no device. A dtype is chosen in the spec, by `dtype` in `source`"
            ) from None
        if asked.type != device.type or asked.index not in (None, device.index):
            raise CallError(
                f"to: the pipeline runs on {device}, and stays there. Load it where you want it: "
                f'load(bundle, device="{asked}")'
            )


class Interrupt:
    """`pipe.interrupt`: called, it ends the call that runs; asked for its truth, it says whether that was done."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @gated()
    def __call__(self) -> bool:
        """Ends the call that runs after the step that it is in; returns False where none runs.

        Raises:
            CallError: the call cannot be cut short.
        """
        return self._executor.interrupt()

    def __bool__(self) -> bool:
        turn = self._executor.turns.current
        return turn is not None and turn.interrupted

    def __repr__(self) -> str:
        return f"<interrupt, {'asked for' if self else 'not asked for'}>"

    def set(self, value: bool) -> None:
        """Does what `pipe._interrupt = value` does: without a call that runs nothing, as in diffusers."""
        if value:
            self()
        elif (turn := self._executor.turns.current) is not None:
            turn.interrupted = False
