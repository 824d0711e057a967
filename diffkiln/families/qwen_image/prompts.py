"""Qwen-Image: prompts are padded to the longest, split by their lengths, and given without a mask where all are as
long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.record.patches import Padding, Patch, resized


def _encode_prompt(
    self: Any,
    prompt: Any,
    device: Any = None,
    num_images_per_prompt: int = 1,
    prompt_embeds: Any = None,
    prompt_embeds_mask: Any = None,
    max_sequence_length: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `max_sequence_length` tokens for every prompt, with a mask of those that count.

    The text encoder is causal and padded on the right: no token sees later ones. So neither the padding nor what
    diffusers reads beyond that length changes a token that counts.
    """
    if prompt_embeds is not None or prompt_embeds_mask is not None:
        raise RecordError("prompt_embeds of QwenImagePipeline are not recorded")
    if self.tokenizer.padding_side != "right" or self.tokenizer.num_special_tokens_to_add():
        raise RecordError("the tokenizer of QwenImagePipeline pads on the left or adds tokens: its length is not fixed")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    start = self.prompt_template_encode_start_idx
    tokens = self.tokenizer(
        [self.prompt_template_encode.format(text) for text in prompts],
        max_length=_text_length(self, max_sequence_length),
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    hidden = self.text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
    ).hidden_states[-1]
    mask = tokens.attention_mask[:, start:]
    embeds = hidden[:, start:].masked_fill(mask.eq(0).unsqueeze(-1), 0.0).to(dtype=self.text_encoder.dtype)
    batch, length, _ = embeds.shape
    embeds = embeds.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length, -1)
    mask = mask.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length)
    return embeds, mask


def _text_length(pipe: Any, max_sequence_length: int) -> int:
    """Returns the number of tokens of a prompt in its template that the denoiser sees."""
    return pipe.prompt_template_encode_start_idx + min(max_sequence_length, pipe.tokenizer_max_length)


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
    text = _text_length(pipe, fixed["max_sequence_length"])
    length = text - pipe.prompt_template_encode_start_idx
    pad_id = pipe.tokenizer.pad_token_id

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        return args, kwargs | {"input_ids": resized(ids, text, pad_id), "attention_mask": resized(mask, text)}

    def cut_text(tensor: torch.Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, kwargs["input_ids"].shape[1]) if tensor.ndim == 3 else tensor

    def used_text(tensor: torch.Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        mask = resized(kwargs["attention_mask"], text).bool()
        return resized(tensor, text)[mask]

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds, mask = kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states_mask"]
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        padded = {
            "encoder_hidden_states": resized(embeds, length),
            "encoder_hidden_states_mask": resized(mask, length),
        }
        return args, kwargs | padded

    return {
        "text_encoder": Padding(pad_tokens, cut_text, used_text),
        "transformer": Padding(pad_embeds),
    }


PATCHES = (
    Patch(
        {
            "encode_prompt": "4cc93fb6792a8967",
            "_get_qwen_prompt_embeds": "66eceb75cb9ea32d",
            "_extract_masked_hidden": "c1c5a9cc25e1ed0c",
        },
        _encode_prompt,
        known_in=(
            "QwenImagePipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline "
            "QwenImageControlNetPipeline QwenImageControlNetInpaintPipeline"
        ),
        paddings=_paddings,
    ),
)
