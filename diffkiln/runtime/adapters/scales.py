"""How much of an adapter is added: one number for all of it, or numbers by block."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffkiln.errors import CallError
from diffkiln.guards.spelling import suggest

#: An adapter is added at most so many times.
MOST = 100.0
_BLOCKS = 1_000


@dataclass(frozen=True)
class PerBlock:
    """Numbers by the beginning of a layer's name, such as "transformer.transformer_blocks.0" or "unet.down_blocks".

    The longest beginning counts. Layers that begin with none of them have 1, as in diffusers.
    """

    numbers: tuple[tuple[str, float], ...]

    def of(self, layer: str) -> float:
        """Returns the number of a layer, whose name begins with its component's."""
        found = [(len(block), number) for block, number in self.numbers if _is_within(layer, block)]
        return max(found)[1] if found else 1.0

    def unknown(self, layers: Iterable[str]) -> str:
        """Returns the first name with which no layer begins; empty if there is none."""
        names = list(layers)
        return next((block for block, _ in self.numbers if not any(_is_within(name, block) for name in names)), "")


#: A scale as it is kept.
Scale = float | PerBlock
#: A scale as callers give it, and are told it.
AnyScale = float | Mapping[str, float]


def scale_of(scale: Scale, layer: str) -> float:
    """Returns the number by which an adapter's change of a layer is multiplied."""
    return scale.of(layer) if isinstance(scale, PerBlock) else scale


def as_given(scale: Scale) -> AnyScale:
    """Returns a scale as callers give it."""
    return dict(scale.numbers) if isinstance(scale, PerBlock) else scale


def checked_scale(name: str, given: Any) -> Scale:
    """Returns a caller's scale of an adapter.

    Raises:
        CallError: it is no number and no mapping of names to numbers, or a number is too large.
    """
    if isinstance(given, PerBlock):  # it was checked when the call began
        return given
    if not isinstance(given, Mapping):
        return _checked(repr(name[:60]), given)
    if not given or len(given) > _BLOCKS or not all(isinstance(block, str) and block for block in given):
        raise CallError(
            f"adapters: the scales of {name[:60]!r} are no numbers by block. "
            'Give such as {"transformer.transformer_blocks.0": 0.5}, or one number'
        )
    pairs = ((block, _checked(f"{name[:60]!r} in {block[:200]}", number)) for block, number in given.items())
    return PerBlock(tuple(sorted(pairs)))


def check_blocks(name: str, scale: Scale, layers: Iterable[str]) -> None:
    """Raises `CallError` if a block has none of an adapter's layers."""
    names = sorted(layers)
    if isinstance(scale, PerBlock) and (block := scale.unknown(names)):
        hint = (
            suggest(block, {part for layer in names for part in _beginnings(layer)})
            or f"One of its layers is {names[0]}"
        )
        raise CallError(f"adapters: {name[:60]!r} has no layer in {block[:200]!r}. {hint}")


def _checked(what: str, given: Any) -> float:
    number = math.nan if isinstance(given, bool) or not isinstance(given, numbers.Real) else float(given)
    if not math.isfinite(number):
        raise CallError(f"adapters: the scale of {what} is no number. Give one such as 0.8; 0 turns it off")
    if abs(number) > MOST:
        raise CallError(f"adapters: the scale of {what} is {number:g}, and ±{MOST:g} is the most. Give less")
    return number


def _is_within(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


def _beginnings(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
