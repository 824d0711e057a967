"""Bria: each prompt is encoded by itself, as long as it is, and filled up with zeros; and a negative prompt that is
empty is not encoded, which is decided by reading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.record.lengths.rewriting import Padding, Rewrite, resized


def _get_t5_prompt_embeds(
    self: Any, prompt: Any = None, num_images_per_prompt: int = 1, max_sequence_length: int = 128, device: Any = None
) -> torch.Tensor:
    """The text encoder does not see the padding, and zeros are written over what it gives for it."""
    rows = []
    for text in [prompt] if isinstance(prompt, str) else prompt:
        tokens = _tokens(self, text, max_sequence_length)
        embeds = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        rows.append(embeds.masked_fill(tokens.attention_mask.eq(0).unsqueeze(-1), 0.0))
    embeds = torch.cat(rows).repeat(1, num_images_per_prompt, 1)
    embeds = embeds.view(len(rows) * num_images_per_prompt, max_sequence_length, -1)
    return embeds.to(dtype=self.transformer.dtype)


def _encode_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Negative prompts of which the first is empty are zeros, which is told from its tokens.

    A prompt of white space alone counts as empty, too, where the tokenizer drops it.
    """

    def encode_prompt(self: Any, prompt: Any, *args: Any, max_sequence_length: int = 128, **kwargs: Any) -> Any:
        negatives = kwargs.get("negative_prompt")
        embeds, negative, ids = original(self, prompt, *args, max_sequence_length=max_sequence_length, **kwargs)
        first = negatives[0] if isinstance(negatives, list) else negatives
        if negative is not None and first:
            told, nothing = (_tokens(self, text, max_sequence_length).input_ids for text in (first, ""))
            negative = negative.masked_fill(told.eq(nothing).all(), 0.0)
        return embeds, negative, ids

    return encode_prompt


def _tokens(pipe: Any, text: str, max_sequence_length: int) -> Any:
    if pipe.tokenizer.padding_side != "right":
        raise RecordError("the tokenizer of BriaPipeline pads on the left: where a prompt begins is not fixed")
    return pipe.tokenizer(
        text,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )


def paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """The text encoder follows the prompt's length."""
    text, pad_id = fixed["max_sequence_length"], pipe.tokenizer.pad_token_id

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (ids,) = args
        return (resized(ids, text, pad_id),), kwargs | {"attention_mask": resized(torch.ones_like(ids), text)}

    def cut(tensor: torch.Tensor, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, args[0].shape[1])

    return {"text_encoder": Padding(pad, cut, cut)}


REWRITES = (
    Rewrite(
        owners=("pipelines.bria.pipeline_bria:BriaPipeline",),
        method="_get_t5_prompt_embeds",
        prints={"_get_t5_prompt_embeds": "736b5caac3b87726"},
        replacement=_get_t5_prompt_embeds,
    ),
    Rewrite(
        owners=("pipelines.bria.pipeline_bria:BriaPipeline",),
        method="encode_prompt",
        prints={"encode_prompt": "039485c44da9b27b"},
        replacement=_encode_prompt,
        around=True,
    ),
)
