"""Flex attention, recorded as attention under the mask that its block mask stands for.

torch's `flex_attention` is an operator of a higher order, which holds functions and fits in no program. A block mask is
a plain mask all the same: the blocks that it names, and inside of them what its `mask_mod` lets through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import flex_attention as flex

from diffkiln.errors import RecordError


@contextlib.contextmanager
def dense_flex_attention() -> Iterator[None]:
    """Replaces flex attention by `scaled_dot_product_attention` with a full mask, inside the `with` block."""
    with mock.patch.object(flex, "flex_attention", _dense_attention):
        yield


def _dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> torch.Tensor:
    """Computes `flex_attention` without a change of scores.

    Raises:
        RecordError: scores are changed by a function, or more than the values is asked for.
    """
    if score_mod is not None or return_lse or return_aux is not None:
        raise RecordError(
            "flex attention with a score_mod or with log-sum-exps cannot be written down, only with masks"
        )
    mask = None if block_mask is None else _dense_mask(block_mask, query.shape[-2], key.shape[-2])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def _dense_mask(mask: Any, queries: int, keys: int) -> torch.Tensor:
    """Returns bool[batch or 1, heads or 1, queries, keys]: which query attends to which key."""
    whole = _blocks(mask.full_kv_num_blocks, mask.full_kv_indices, mask, queries, keys)
    part = _blocks(mask.kv_num_blocks, mask.kv_indices, mask, queries, keys)
    if part is None:
        raise RecordError("a block mask without blocks")
    if not _is_trivial(mask.mask_mod):
        batch, heads = mask.kv_num_blocks.shape[:2]
        part = part & flex.create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(part.device))
    return part if whole is None else part | whole


def _is_trivial(mask_mod: Any) -> bool:
    return mask_mod is None or mask_mod is flex.noop_mask


def _blocks(
    count: torch.Tensor | None, indices: torch.Tensor | None, mask: Any, queries: int, keys: int
) -> torch.Tensor | None:
    """Returns the mask of all elements of these blocks: the first `count` of each row of `indices`."""
    if count is None or indices is None:
        return None
    wide, high = mask.BLOCK_SIZE[1], mask.BLOCK_SIZE[0]
    columns = indices.shape[-1]
    named = torch.arange(columns, device=indices.device) < count.unsqueeze(-1)
    taken = torch.where(named, indices, columns).long()  # what is not named goes one column too far
    blank = torch.zeros_like(taken, dtype=torch.bool)
    dense = torch.cat([blank, blank[..., :1]], -1).scatter(-1, taken, torch.ones_like(taken, dtype=torch.bool))
    dense = dense[..., :columns].repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return dense[..., :queries, :keys]
