"""Mochi: attention joins the valid part of each prompt with its video, one row of the batch after the other; and a
prompt that is empty may be zeroed, which is decided by reading it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Patch


def _get_t5_prompt_embeds(
    self: Any,
    prompt: Any = None,
    num_videos_per_prompt: int = 1,
    max_sequence_length: int = 256,
    device: Any = None,
    dtype: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads from the tokens whether the last prompt is empty; diffusers then zeroes all prompts.

    A prompt of white space alone also counts as empty if the tokenizer drops it.
    """
    if self.tokenizer.padding_side != "right":
        raise RecordError("the tokenizer of MochiPipeline pads on the left: where a prompt begins is not fixed")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    options = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True, "return_tensors": "pt"}
    tokens = self.tokenizer(prompts, add_special_tokens=True, **options)
    ids, mask = tokens.input_ids, tokens.attention_mask.bool()
    if self.config.force_zeros_for_empty_prompt:
        is_empty = ids[-1:].eq(self.tokenizer("", **options).input_ids).all()
        ids, mask = ids.masked_fill(is_empty, 0), mask.masked_fill(is_empty, False)
    embeds = self.text_encoder(ids, attention_mask=mask)[0]
    embeds = embeds.to(dtype=dtype or self.text_encoder.dtype, device=device or self._execution_device)
    batch, length, _ = embeds.shape
    embeds = embeds.repeat(1, num_videos_per_prompt, 1).view(batch * num_videos_per_prompt, length, -1)
    return embeds, mask.repeat(num_videos_per_prompt, 1)


def _attend(
    self: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention without the padding, with zeros for its results, which is diffusers' filling."""
    video, text = hidden_states, encoder_hidden_states
    query, key, value = (each(video).unflatten(2, (attn.heads, -1)) for each in (attn.to_q, attn.to_k, attn.to_v))
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_query, text_key, text_value = (each(text).unflatten(2, (attn.heads, -1)) for each in projections)
    text_query, text_key = _normed(attn.norm_added_q, text_query), _normed(attn.norm_added_k, text_key)
    if image_rotary_emb is not None:
        query, key = _rotated(query, *image_rotary_emb), _rotated(key, *image_rotary_emb)

    within = attention_mask.bool()
    seen = functional.pad(within, (video.shape[1], 0), value=True)
    pairs = ((query, text_query), (key, text_key), (value, text_value))
    joint = functional.scaled_dot_product_attention(
        *(torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs), attn_mask=seen[:, None, None, :]
    )
    joint = joint.transpose(1, 2).flatten(2, 3)
    video, text = joint.split_with_sizes((video.shape[1], text.shape[1]), dim=1)
    text = text.masked_fill(~within.unsqueeze(-1), 0.0)
    video = attn.to_out[1](attn.to_out[0](video))
    return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _normed(norm: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if norm is None else norm(tensor)


def _rotated(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = tensor[..., 0::2].float(), tensor[..., 1::2].float()
    turned = (even * cos - odd * sin).to(tensor.dtype), (even * sin + odd * cos).to(tensor.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


PLUGIN = Family(
    patches=(
        Patch({"_get_t5_prompt_embeds": "a40d91a59699669f"}, _get_t5_prompt_embeds, known_in="MochiPipeline"),
        Patch({"__call__": "a36635e5362507c5"}, _attend, known_in="MochiAttnProcessor2_0"),
    ),
)
