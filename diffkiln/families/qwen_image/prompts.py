"""Qwen-Image: prompts are padded to the longest, split by their lengths, and given without a mask where all are as
long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.record.patches import Padding, Patch, resized

#: Of the template of the modular pipeline's blocks, and of the longest prompt.
_START, _LONGEST = 34, 1024


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
    template = self.prompt_template_encode, self.prompt_template_encode_start_idx
    length = _text_length(self, max_sequence_length)
    embeds, mask = _encoded(self.text_encoder, self.tokenizer, prompt, *template, length)
    embeds = embeds.to(dtype=self.text_encoder.dtype)
    batch, length, _ = embeds.shape
    embeds = embeds.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length, -1)
    mask = mask.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length)
    return embeds, mask


def _encoded(
    text_encoder: Any, tokenizer: Any, prompt: Any, template: str, start: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the text encoder makes of `length` tokens, without the `start` of the template, and the mask."""
    if tokenizer.padding_side != "right" or tokenizer.num_special_tokens_to_add():
        raise RecordError("the tokenizer of Qwen-Image pads on the left or adds tokens: its length is not fixed")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = [template.format(text) for text in prompts]
    tokens = tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    hidden = text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
    ).hidden_states[-1]
    mask = tokens.attention_mask[:, start:]
    return hidden[:, start:].masked_fill(mask.eq(0).unsqueeze(-1), 0.0), mask


def _text_step(self: Any, components: Any, state: Any) -> tuple[Any, Any]:
    """Does the same in the place of the modular pipeline's block of text."""
    block = self.get_block_state(state)
    self.check_inputs(block.prompt, block.negative_prompt, block.max_sequence_length)
    template = self.prompt_template_encode, self.prompt_template_encode_start_idx
    parts = components.text_encoder, components.tokenizer
    length = _text_length(self, block.max_sequence_length)
    block.prompt_embeds, block.prompt_embeds_mask = _encoded(*parts, block.prompt, *template, length)
    block.negative_prompt_embeds = block.negative_prompt_embeds_mask = None
    if components.requires_unconditional_embeds:
        negative = block.negative_prompt or ""
        block.negative_prompt_embeds, block.negative_prompt_embeds_mask = _encoded(*parts, negative, *template, length)
    self.set_block_state(state, block)
    return components, state


def _rotary_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has a block see masks of which all counts: it reads the lengths of prompts, for which the denoiser has no use."""

    def called(self: Any, components: Any, state: Any) -> tuple[Any, Any]:
        masks = {name: state.get(name) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
        for name, mask in masks.items():
            if mask is not None:
                state.set(name, torch.ones(mask.shape, dtype=torch.int64))
        result = original(self, components, state)
        for name, mask in masks.items():
            state.set(name, mask)
        return result

    return called


def _text_length(pipe: Any, max_sequence_length: int) -> int:
    """Returns the number of tokens of a prompt in its template that the denoiser sees: of a pipeline or a block."""
    return _start(pipe) + min(max_sequence_length, getattr(pipe, "tokenizer_max_length", _LONGEST))


def _start(pipe: Any) -> int:
    """Returns where a prompt begins in its template. Blocks have their template's as a constant of diffusers."""
    return getattr(pipe, "prompt_template_encode_start_idx", _START)


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
    text = _text_length(pipe, fixed["max_sequence_length"])
    length = text - _start(pipe)
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

    padding = Padding(pad_embeds)
    found = {"text_encoder": Padding(pad_tokens, cut_text, used_text), "transformer": padding, "controlnet": padding}
    return {name: each for name, each in found.items() if name in pipe.components}


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
    Patch(
        {
            "__call__": "797157ebf51f2b68",
            "get_qwen_prompt_embeds": "403ea275fa1e1faa",
            "_extract_masked_hidden": "b02008d86d89136e",
        },
        _text_step,
        known_in="QwenImageTextEncoderStep",
        paddings=_paddings,
    ),
    Patch(
        {"__call__": "be87f94d52739c27 b67175d52a51c99f fe0c013c7bbe95ee 4b4032d47c108966"},
        _rotary_step,
        known_in=(
            "QwenImageRoPEInputsStep QwenImageEditRoPEInputsStep QwenImageEditPlusRoPEInputsStep "
            "QwenImageLayeredRoPEInputsStep"
        ),
        around=True,
    ),
)
