"""Self-attention over fewer tokens: similar ones are merged before it and take the same result after it.

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", 2023, https://arxiv.org/abs/2303.17604. Here every
fourth token of the sequence is one that others may be merged into; nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from diffkiln.interpreter.layers.blocks import matching, repeated_blocks

#: One token of so many is one that others are merged into.
STRIDE = 4
#: More than the others cannot be merged.
MOST = 1 - 1 / STRIDE


class Merging:
    """A mix-in for an attention's own class."""

    merged_ratio: float

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes attention over the merged tokens of `hidden_states` [batch, tokens, channels]; the shape stays."""
        count = int(hidden_states.shape[1] * self.merged_ratio)
        attend = super().forward  # type: ignore[misc]
        if count == 0:
            return attend(hidden_states, *args, **kwargs)
        pairs = _Pairs(hidden_states, count)
        return pairs.unmerge(attend(pairs.merge(hidden_states), *args, **kwargs))


class _Pairs:
    """The tokens to be merged: the `count` of the others that are most like one of every fourth."""

    def __init__(self, tokens: torch.Tensor, count: int) -> None:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        self.kept = positions[::STRIDE]
        self.others = positions[positions % STRIDE != 0]
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        structural_key = unit[:, self.others] @ unit[:, self.kept].transpose(1, 2)
        best, into = structural_key.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        self.gone, self.staying = order[:, :count], order[:, count:]  # of `others`
        self.into = into.gather(1, self.gone)  # of `kept`

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """Merges tokens [batch, tokens, channels] → [batch, tokens − count, channels]: the staying others, then the
        kept.
        """
        channels = tokens.shape[-1]
        others, kept = tokens[:, self.others], tokens[:, self.kept]
        staying = others.gather(1, _wide(self.staying, channels))
        moved = others.gather(1, _wide(self.gone, channels))
        total = kept.scatter_add(1, _wide(self.into, channels), moved)
        ones = torch.ones_like(self.into, dtype=tokens.dtype)
        size = torch.ones_like(kept[..., 0]).scatter_add(1, self.into, ones)
        return torch.cat((staying, total / size.unsqueeze(-1)), dim=1)

    def unmerge(self, tokens: torch.Tensor) -> torch.Tensor:
        """Restores all tokens: a merged token takes the result of the token that it was merged into."""
        channels = tokens.shape[-1]
        moved = tokens[:, self.staying.shape[1] :].gather(1, _wide(self.into, channels))
        kept = self.kept.expand(tokens.shape[0], -1)
        positions = torch.cat((self.others[self.staying], kept, self.others[self.gone]), dim=1)
        return torch.cat((tokens, moved), dim=1).gather(1, _wide(positions.argsort(dim=1), channels))


def _wide(index: torch.Tensor, channels: int) -> torch.Tensor:
    return index.unsqueeze(-1).expand(-1, -1, channels)


def self_attentions(module: torch.nn.Module, patterns: Sequence[str]) -> dict[str, torch.nn.Module]:
    """Returns the self-attentions of a UNet's transformer blocks with matching names, by name."""
    blocks = dict(repeated_blocks(module))
    found: dict[str, torch.nn.Module] = {}
    for name in matching(list(blocks), patterns):
        attention = getattr(blocks[name], "attn1", None)
        if attention is not None and not getattr(blocks[name], "only_cross_attention", False):
            found[f"{name}.attn1"] = attention
    return found


def merge_tokens(module: torch.nn.Module, ratio: float, patterns: Sequence[str]) -> list[str]:
    """Makes the matching self-attentions merge this share of their tokens. Returns their names."""
    chosen = self_attentions(module, patterns)
    for attention in chosen.values():
        attention.__class__ = _class(type(attention))
        attention.merged_ratio = ratio  # type: ignore[assignment]
    return list(chosen)


@cache
def _class(base: type) -> type:
    return type(base.__name__, (Merging, base), {})
