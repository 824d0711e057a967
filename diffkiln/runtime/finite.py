"""Results that are no pictures: numbers that overflowed to infinity, or became none at all (NaN).

Each component's outputs are added up as they come, one reduction each, and nobody waits for the sums: a sum is finite
where its terms are. They are read once, at the end of the call, which copies the result from the device anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from diffkiln.errors import NotFinite

_SUMMED = {
    torch.float16: torch.float32,  # whose sums overflow where the terms do not
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
#: How pipelines name the components that turn latents into pictures, and of which some have `force_upcast`.
_DECODERS = ("vae", "vqvae", "movq", "vqgan")


@dataclass(frozen=True)
class Outputs:
    """The results of one call of a component: the sums of its tensors, and their type."""

    component: str
    sums: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    @property
    def finite(self) -> bool:
        return all_finite(self.sums)


def outputs_of(component: str, tensors: Iterable[torch.Tensor]) -> Outputs | None:
    """Returns the sums of a component's outputs; None where none of them could overflow."""
    floating = [tensor for tensor in tensors if tensor.dtype in _SUMMED and tensor.numel()]
    if not floating:
        return None
    sums = tuple(tensor.sum(dtype=_SUMMED[tensor.dtype]) for tensor in floating)
    return Outputs(component, sums, floating[0].dtype)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns True if every number of them is finite; those that cannot be otherwise count as such."""
    summed = [tensor.sum(dtype=_SUMMED[tensor.dtype]) for tensor in tensors if tensor.dtype in _SUMMED]
    return bool(torch.isfinite(torch.stack([item.double() for item in summed])).all()) if summed else True


def check(outputs: Sequence[Outputs], results: Sequence[torch.Tensor], decoded: bool) -> None:
    """Looks at what a call gave.

    A text encoder may give numbers that are not finite for tokens that nobody reads. So they count only where they
    reach the result, or come out of the last component: what follows it makes black or white of infinity.

    Args:
        outputs: of the components, in the order of their calls.
        results: of the call.
        decoded: whether the last component made the results.

    Raises:
        NotFinite: they are no picture; names the first component that gave such numbers.
    """
    last = outputs[-1:] if decoded else ()
    if all_finite(results) and all(item.finite for item in last):
        return
    first = next((item for item in outputs if not item.finite), None)
    raise not_finite(first.component if first else "", first.dtype if first else None)


def not_finite(component: str, dtype: torch.dtype | None) -> NotFinite:
    """Returns the error for a component, the first whose output was not finite; "" where every component's was."""
    keep = "allow_nan=True (--allow-nan) keeps the result"
    if not component:
        return NotFinite(f"the result is not finite, though what every component gave is. {keep}")
    if dtype is torch.float16:
        decoder = component.startswith(_DECODERS)
        upcast = ', or take a VAE with "force_upcast": true in its config.json' if decoder else ""
        hint = f'float16 overflows: compile with "dtype": "bfloat16" in "source"{upcast}'
    else:
        hint = "Look at what the call was given (latents, images, callback), and at the weights"
    where = f" ({str(dtype).removeprefix('torch.')})" if dtype else ""
    return NotFinite(f"{component}: its output{where} is not finite, so the result is no picture. {hint}. {keep}")
