"""Lumina-Next: prompts are padded to the longest of the batch and a multiple of 8, and negative prompts are cut to
that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from diffkiln.errors import RecordError
from diffkiln.record.lengths.rewriting import Padding, Rewrite, resized

#: diffusers' pad_to_multiple_of.
_MULTIPLE = 8
_Side = Literal["left", "right"]


def _encode_prompt(
    self: Any,
    prompt: Any,
    do_classifier_free_guidance: bool = True,
    negative_prompt: Any = None,
    num_images_per_prompt: int = 1,
    device: Any = None,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    prompt_attention_mask: Any = None,
    negative_prompt_attention_mask: Any = None,
    clean_caption: bool = False,
    **_kwargs: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Every prompt has the `max_sequence_length` of the pipeline, with zeros where diffusers has no tokens.

    The denoiser knows no places in the text, so that only its mask matters.
    """
    if prompt_embeds is not None or negative_prompt_embeds is not None:
        raise RecordError("prompt_embeds of LuminaPipeline are not recorded")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids, mask = _tokens(self, self._text_preprocessing(prompts, clean_caption=clean_caption))
    longest = (mask.sum(dim=1).amax() + (_MULTIPLE - 1)).floor_divide(_MULTIPLE) * _MULTIPLE
    positive = _encoded(self, ids, mask, longest, num_images_per_prompt)
    if not do_classifier_free_guidance:
        return *positive, None, None
    negatives = "" if negative_prompt is None else negative_prompt
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
    if len(negatives) != len(prompts):
        raise RecordError(f"negative_prompt of LuminaPipeline: {len(negatives)} for {len(prompts)} prompts")
    ids, mask = _cut(*_tokens(self, negatives), longest, self.tokenizer.padding_side, self.tokenizer.pad_token_id)
    return *positive, *_encoded(self, ids, mask, longest, num_images_per_prompt)


def _tokens(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.max_sequence_length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask


def _cut(
    ids: torch.Tensor, mask: torch.Tensor, longest: torch.Tensor, side: _Side, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `longest` tokens of each prompt, padded on the side where they were."""
    text = ids.shape[1]
    counts = mask.sum(dim=1, keepdim=True)
    kept = counts.clamp(max=longest)
    places = torch.arange(text, device=ids.device).expand_as(ids)
    if side == "left":
        ids = ids.gather(1, (places - (counts - kept)).clamp(min=0))
        within = places >= text - kept
    else:
        within = places < kept
    return ids.masked_fill(~within, pad_id), within.to(mask.dtype)


def _encoded(
    pipe: Any, ids: torch.Tensor, mask: torch.Tensor, longest: torch.Tensor, repeats: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, tokens, channels] and the mask, in the order in which diffusers repeats each."""
    side, (batch, text) = pipe.tokenizer.padding_side, ids.shape
    more = _positions(ids, longest, side)
    hidden = pipe.text_encoder(ids, attention_mask=mask, output_hidden_states=True, **more).hidden_states[-2]
    places = torch.arange(text, device=ids.device)
    within = places >= text - longest if side == "left" else places < longest
    embeds = hidden.to(dtype=pipe.text_encoder.dtype).masked_fill(~within.unsqueeze(-1), 0.0)
    return embeds.repeat(1, repeats, 1).view(batch * repeats, text, -1), mask.repeat(repeats, 1)


def _positions(ids: torch.Tensor, longest: torch.Tensor, side: _Side) -> dict[str, torch.Tensor]:
    """Where the tokens stand for diffusers, which counts from the beginning of its padding."""
    if side == "right":
        return {}
    places = torch.arange(ids.shape[1], device=ids.device)
    return {"position_ids": (places - (ids.shape[1] - longest)).clamp(min=0).expand_as(ids)}


def paddings(pipe: Any, _fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Both components follow the prompt's length."""
    text, side, pad_id = pipe.max_sequence_length, pipe.tokenizer.padding_side, pipe.tokenizer.pad_token_id

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (ids,) = args
        padded = resized(ids, text, pad_id, side)
        more = _positions(padded, torch.tensor(ids.shape[1]), side)
        return (padded,), kwargs | {"attention_mask": resized(kwargs["attention_mask"], text, side=side)} | more

    def cut_text(tensor: torch.Tensor, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, args[0].shape[1], side=side) if tensor.ndim == 3 else tensor

    def used_text(tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return cut_text(tensor, args, kwargs)[kwargs["attention_mask"].bool()]

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = "encoder_hidden_states", "encoder_mask"
        return args, kwargs | {name: resized(kwargs[name], text, side=side) for name in names}

    return {"text_encoder": Padding(pad_tokens, cut_text, used_text), "transformer": Padding(pad_embeds)}


REWRITES = (
    Rewrite(
        owners=("pipelines.lumina.pipeline_lumina:LuminaPipeline",),
        method="encode_prompt",
        prints={"encode_prompt": "e90b02810de2433c", "_get_gemma_prompt_embeds": "8836294298df3264"},
        replacement=_encode_prompt,
    ),
)
