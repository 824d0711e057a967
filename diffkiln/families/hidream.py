"""HiDream: each token goes to a few of several experts, and how many an expert gets follows the tokens."""

from __future__ import annotations

from typing import Any

import torch

from diffkiln.families import Family
from diffkiln.record.patches import Patch


def _moe_infer(
    self: Any, x: torch.Tensor, flat_expert_indices: torch.Tensor, flat_expert_weights: torch.Tensor
) -> torch.Tensor:
    """Returns [tokens, channels]: every expert sees all tokens, and counts where a token was sent to it.

    It costs as many experts as there are, and diffusers' own as many as each token is sent to.
    """
    tokens, channels = x.shape
    sent = flat_expert_indices.view(tokens, -1)
    weights = flat_expert_weights.view(tokens, -1)
    total = torch.zeros_like(x)
    for index, expert in enumerate(self.experts):
        own = weights.masked_fill(sent != index, 0.0).sum(dim=-1, keepdim=True)
        given = expert(x)
        total = total + (given * own).to(given.dtype)
    return total.view(tokens, channels)


PLUGIN = Family(
    patches=(Patch({"moe_infer": "94c20218ff8964da"}, _moe_infer, known_in="MOEFeedForwardSwiGLU", outside=True),),
)
