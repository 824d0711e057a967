"""Lumina-Next and Lumina 2.

Lumina-Next: prompts are padded to the longest of the batch and a multiple of 8, and negative prompts are cut to
that.

Lumina 2: the denoiser joins the valid part of each caption with its image, and reads the length from the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized

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
    """Returns embeddings of the pipeline's `max_sequence_length`, with zeros where diffusers has no tokens.

    The denoiser does not use positions of the text, so only its mask matters.
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
    """Returns the first `longest` tokens of each prompt, padded on the original side."""
    text = ids.shape[1]
    counts = mask.sum(dim=1, keepdim=True)
    kept = counts.clamp(max=longest)
    positions = torch.arange(text, device=ids.device).expand_as(ids)
    if side == "left":
        ids = ids.gather(1, (positions - (counts - kept)).clamp(min=0))
        within = positions >= text - kept
    else:
        within = positions < kept
    return ids.masked_fill(~within, pad_id), within.to(mask.dtype)


def _encoded(
    pipe: Any, ids: torch.Tensor, mask: torch.Tensor, longest: torch.Tensor, repeats: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns [batch, tokens, channels] and the mask, in the order in which diffusers repeats each."""
    side, (batch, text) = pipe.tokenizer.padding_side, ids.shape
    more = _positions(ids, longest, side)
    hidden = pipe.text_encoder(ids, attention_mask=mask, output_hidden_states=True, **more).hidden_states[-2]
    positions = torch.arange(text, device=ids.device)
    within = positions >= text - longest if side == "left" else positions < longest
    embeds = hidden.to(dtype=pipe.text_encoder.dtype).masked_fill(~within.unsqueeze(-1), 0.0)
    return embeds.repeat(1, repeats, 1).view(batch * repeats, text, -1), mask.repeat(repeats, 1)


def _positions(ids: torch.Tensor, longest: torch.Tensor, side: _Side) -> dict[str, torch.Tensor]:
    """Returns the tokens' positions in diffusers, which counts from the beginning of its padding."""
    if side == "right":
        return {}
    positions = torch.arange(ids.shape[1], device=ids.device)
    return {"position_ids": (positions - (ids.shape[1] - longest)).clamp(min=0).expand_as(ids)}


def _paddings(pipe: Any, _fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
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


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Puts the whole caption before the image, and hides its padding from attention.

    Attention knows places by their rotary embeddings alone, so a token's index does not matter.
    """
    if attention_kwargs:
        raise RecordError("attention_kwargs of Lumina2Transformer2DModel are not recorded")
    p = self.config.patch_size
    batch, channels, height, width = hidden_states.shape
    rows, columns = height // p, width // p
    text = encoder_hidden_states.shape[1]

    temb, caption = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    lengths = encoder_attention_mask.sum(dim=1, keepdim=True)
    positions = torch.arange(text, device=lengths.device).expand(batch, text)
    within = positions < lengths
    ids = torch.cat([_caption_ids(positions, within), _image_ids(lengths, rows, columns)], dim=1)
    # diffusers keeps them in complex128, which programs do not have; they meet queries and keys in float32.
    rotary = torch.cat(
        [freqs.to(torch.complex64)[ids[..., i]] for i, freqs in enumerate(self.rope_embedder.freqs_cis)], dim=-1
    )
    patches = hidden_states.view(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    image = self.x_embedder(patches.flatten(3).flatten(1, 2))

    in_caption = rotary[:, :text].masked_fill(~within.unsqueeze(-1), 0.0)
    for layer in self.context_refiner:
        caption = layer(caption, encoder_attention_mask, in_caption)
    in_image = rotary[:, text:]
    for layer in self.noise_refiner:
        image = layer(image, None, in_image, temb)

    joint = torch.cat([caption, image], dim=1)
    mask = torch.cat([within, within.new_ones(batch, rows * columns)], dim=1)
    for layer in self.layers:
        joint = layer(joint, mask, rotary, temb)

    image = self.norm_out(joint[:, text:], temb)
    image = image.reshape(batch, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    image = image.flatten(4, 5).flatten(2, 3)
    if not return_dict:
        return (image,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=image)


def _caption_ids(positions: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """Returns [batch, text, 3]: the place in the caption, which is 0 in the padding."""
    counted = torch.where(within, positions, torch.zeros_like(positions))
    return torch.stack([counted, torch.zeros_like(positions), torch.zeros_like(positions)], dim=-1)


def _image_ids(lengths: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns [batch, rows · columns, 3]: the caption's length, and the place in the image."""
    batch, device = lengths.shape[0], lengths.device
    down = torch.arange(rows, device=device).repeat_interleave(columns).expand(batch, -1)
    across = torch.arange(columns, device=device).repeat(rows).expand(batch, -1)
    return torch.stack([lengths.expand(batch, rows * columns), down, across], dim=-1)


PLUGIN = Family(
    patches=(
        Patch(
            {"encode_prompt": "e90b02810de2433c", "_get_gemma_prompt_embeds": "8836294298df3264"},
            _encode_prompt,
            known_in="LuminaPipeline",
            paddings=_paddings,
        ),
        Patch(
            {"forward": "d875461bb0a16a45", "Lumina2RotaryPosEmbed.forward": "df5ac9b8bf129394"},
            _forward,
            known_in="Lumina2Transformer2DModel",
        ),
    ),
)
