"""Flex attention: what is written down in its place lets through what the block mask does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from diffkiln.errors import RecordError
from diffkiln.record.flex import dense_flex_attention

LENGTH, BLOCK = 24, 8


def near(b, h, q, kv):
    return (q - kv).abs() < 5


def of_a_function():
    return flex.create_block_mask(near, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)


def of_whole_blocks():
    """Blocks by number, as sparse attention chooses them; the first row has two, the others one."""
    counts = torch.tensor([[[2, 1, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 2, 1], [1, 0, 2], [2, 0, 1]]]], dtype=torch.int32)
    blank = torch.zeros_like(counts)
    return flex.BlockMask.from_kv_blocks(blank, indices, counts, indices, BLOCK_SIZE=BLOCK, mask_mod=None)


@pytest.mark.parametrize("make", [of_a_function, of_whole_blocks, lambda: None])
def test_gives_what_flex_attention_gives(make):
    query, key, value = torch.randn(3, 1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = make()
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if make is of_a_function:
        allowed = flex.create_mask(near, None, None, LENGTH, LENGTH, device="cpu")[0, 0]
    elif make is of_whole_blocks:
        blocks = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
        allowed = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    scores = (query @ key.transpose(-1, -2) / 4).masked_fill(~allowed, float("-inf"))
    with dense_flex_attention():
        found = flex.flex_attention(query, key, value, block_mask=mask)
    assert torch.allclose(found, scores.softmax(-1) @ value, atol=1e-5)


def test_functions_of_scores_are_refused():
    query = torch.zeros(1, 1, 8, 16)
    with dense_flex_attention(), pytest.raises(RecordError, match="score_mod"):
        flex.flex_attention(query, query, query, score_mod=lambda score, *_: score)
