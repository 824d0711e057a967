"""What a loaded pipeline can be asked for about adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffkiln.errors import CallError
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.runtime.adapters.scales import AnyScale
from diffkiln.runtime.adapters.shelf import Shelf
from diffkiln.runtime.turns import PATIENCE

_HUB = "hf://"


class Adaptable:
    """A pipeline whose weights LoRA adapters can be added to."""

    limits: Limits
    _shelf: Shelf

    @property
    def adapters(self) -> Mapping[str, AnyScale]:
        """Returns the adapters that are loaded, each with its scale; 0 for those that are turned off."""
        return MappingProxyType(dict(self._shelf.mix))

    @property
    def adapter_slots(self) -> int:
        """Returns how many adapters one call may use beside the weights; 0 where they are added to the weights."""
        return self._shelf.slots

    @gated()
    def load_lora(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        scale: AnyScale = 1.0,
        *,
        ignore: Sequence[str] = (),
        component: str | None = None,
        requantize: bool = False,
        merged: bool = False,
        timeout: float | None = PATIENCE,
    ) -> str:
        """Reads a LoRA and adds it to the weights. Compiles nothing; the bundle's files stay as they are.

        Args:
            path: a safetensors file, or hf://owner/name@commit/FILE, which is fetched from the Hub once.
            name: what other calls name the adapter; by default the file's name without its ending.
            scale: the factor by which the adapter is multiplied; 0 loads it turned off. Or factors by block, such as
                {"unet.down_blocks": 0.5}, by the beginnings of layers' names; 1 where none fits.
            ignore: patterns of names of tensors in the file that are left out on purpose, such as `text_encoder*`.
            component: the component of layers whose names say none; by default the transformer or the U-Net.
            requantize: allows sums to be rounded to quantized weights; without it such layers are refused.
            merged: adds the adapter to the weights also where the bundle has slots for adapters; then it is in all
                rows of a batch or in none.
            timeout: seconds to wait for calls of other threads; None waits for ever.

        Returns:
            The adapter's name.

        Raises:
            CallError: the file is no safetensors file, is for another architecture, changes layers that the bundle
                lacks, or holds numbers that are not finite; the name is taken; engines hold the weights; or the bundle
                has slots, and the rank is higher than theirs, or a layer has none.
            LimitExceeded: the file is larger, or a rank higher, than the limits allow.
            Busy: calls of other threads took longer than `timeout`.
            HubError: the Hub does not have the file, or refuses it.
        """
        with applied(self.limits):
            file = _file(path)
            named = file.stem if name is None else name
            _check_name(named)
            wanted = self._shelf.wanted(component, _patterns(ignore), bool(requantize), bool(merged))
            self._shelf.load(file, named, scale, wanted, timeout)
        return named

    @gated()
    def set_adapters(self, adapters: Mapping[str, AnyScale], *, timeout: float | None = PATIENCE) -> None:
        """Makes these the adapters of all later calls, with these scales; the others are turned off.

        Without any adapter the weights are the bundle's own, bit for bit.

        Args:
            adapters: names of loaded adapters, and the scale of each; {} turns all off.
            timeout: seconds to wait for calls of other threads; None waits for ever.

        Raises:
            CallError: an adapter is not loaded, a scale is no number, or a block has none of the adapter's layers.
            Busy: calls of other threads took longer than `timeout`.
        """
        self._shelf.set(self._shelf.checked_mix(adapters), timeout)

    @gated()
    def unload_lora(self, name: str, *, timeout: float | None = PATIENCE) -> None:
        """Takes an adapter out of the weights, and frees its memory.

        Args:
            name: of a loaded adapter.
            timeout: seconds to wait for calls of other threads; None waits for ever.

        Raises:
            CallError: no adapter of this name is loaded.
            Busy: calls of other threads took longer than `timeout`.
        """
        self._shelf.unload(name, timeout)


def _file(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise CallError("load_lora: give the path of a safetensors file, or hf://owner/name@commit/FILE")
    text = os.fspath(path)
    if isinstance(text, str) and text.startswith(_HUB):
        from diffkiln.hub import adapter_file

        return adapter_file(text)
    return Path(os.fsdecode(text)).expanduser()


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise CallError("load_lora: name: give 1 to 100 printable characters, such as name='style'")


def _patterns(ignore: Any) -> tuple[str, ...]:
    listed = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) for item in listed):
        raise CallError('load_lora: ignore: give patterns of tensors\' names, such as ["text_encoder*"]')
    return tuple(listed)
