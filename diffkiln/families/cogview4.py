"""CogView 4: prompts are filled up on the left to the longest of the batch and to a multiple of 16, and both the text
encoder and the denoiser see what they are filled up with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized

#: What diffusers fills a batch up to a multiple of.
_MULTIPLE = 16


def _get_glm_embeds(
    self: Any, prompt: Any = None, max_sequence_length: int = 1024, device: Any = None, dtype: Any = None
) -> torch.Tensor:
    """Returns embeddings of the full length, with zeros for tokens before diffusers' first one.

    One more channel says which tokens diffusers would have: they follow the longest prompt of the batch, and the
    negative prompts have their own.
    """
    if self.tokenizer.padding_side != "left":
        raise RecordError("the tokenizer of CogView4Pipeline pads on the right: where a prompt ends is not fixed")
    tokens = self.tokenizer(
        [prompt] if isinstance(prompt, str) else prompt,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    text = _text_length(max_sequence_length)
    ids = resized(tokens.input_ids, text, self.tokenizer.pad_token_id, side="left")
    longest = tokens.attention_mask.sum(dim=1).amax()
    start = text - (longest + (_MULTIPLE - 1)).floor_divide(_MULTIPLE) * _MULTIPLE
    hidden = self.text_encoder(ids, output_hidden_states=True, **_position_ids(ids, start)).hidden_states[-2]
    return _marked(hidden.to(dtype=dtype or self.text_encoder.dtype), start)


def _text_length(max_sequence_length: int) -> int:
    return max_sequence_length + -max_sequence_length % _MULTIPLE


def _position_ids(ids: torch.Tensor, start: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns a mask [batch, 1, to, from] and positions [batch, tokens] that say where tokens begin.

    Tokens before the beginning attend to themselves, so that no query is left without a key.
    """
    batch, text = ids.shape
    positions = torch.arange(text, device=ids.device)
    before = positions < start
    alike = before.unsqueeze(0).eq(before.unsqueeze(1))
    causal = positions.unsqueeze(0) <= positions.unsqueeze(1)
    return {
        "attention_mask": alike.logical_and(causal).expand(batch, 1, text, text),
        "position_ids": (positions - start).clamp(min=0).expand(batch, text),
    }


def _marked(embeds: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Returns [batch, tokens, channels + 1]: zeros before the beginning; the last channel is one from there on."""
    seen = (torch.arange(embeds.shape[1], device=embeds.device) >= start).unsqueeze(-1)
    channel = seen.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
    return torch.cat([embeds.masked_fill(~seen, 0.0), channel], dim=-1)


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the denoiser's own forward, with the last channel of the text as the mask of its attention."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        original_size: torch.Tensor,
        target_size: torch.Tensor,
        crop_coords: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states.shape[-1] == self.config.text_embed_dim + 1:
            kwargs["attention_mask"] = encoder_hidden_states[..., -1].gt(0.5)
            encoder_hidden_states = encoder_hidden_states[..., :-1]
        sizes = original_size, target_size, crop_coords
        return original(self, hidden_states, encoder_hidden_states, timestep, *sizes, **kwargs)

    return forward


def _attend(
    self: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention with a mask of keys. diffusers would add it as a bias of 0 or 1, and never gives one."""
    from diffusers.models.embeddings import apply_rotary_emb

    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise RecordError("an attention_mask of CogView4Transformer2DModel is not recorded")
    dtype, text = encoder_hidden_states.dtype, encoder_hidden_states.shape[1]
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    projections = attn.to_q, attn.to_k, attn.to_v
    query, key, value = (each(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in projections)
    query = query if attn.norm_q is None else attn.norm_q(query).to(dtype=dtype)
    key = key if attn.norm_k is None else attn.norm_k(key).to(dtype=dtype)
    if image_rotary_emb is not None:

        def rotated(tensor: torch.Tensor) -> torch.Tensor:
            image: Any = apply_rotary_emb(tensor[:, :, text:], image_rotary_emb, use_real_unbind_dim=-2)
            return torch.cat([tensor[:, :, :text], image], dim=2)

        query, key = rotated(query), rotated(key)
    seen = None
    if attention_mask is not None:
        seen = functional.pad(attention_mask, (0, hidden_states.shape[1]), value=True)[:, None, None, :]
    joint = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    joint = joint.transpose(1, 2).flatten(2, 3).type_as(query)
    joint = attn.to_out[1](attn.to_out[0](joint))
    return joint[:, text:], joint[:, :text]


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
    text = _text_length(fixed["max_sequence_length"])
    pad_id = pipe.tokenizer.pad_token_id

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (ids,) = args
        padded = resized(ids, text, pad_id, side="left")
        return (padded,), kwargs | _position_ids(padded, torch.tensor(text - ids.shape[1]))

    def last(tensor: torch.Tensor, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return tensor[:, -args[0].shape[1] :] if tensor.ndim == 3 else tensor

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = kwargs["encoder_hidden_states"]
        start = torch.tensor(text - embeds.shape[1])
        return args, kwargs | {"encoder_hidden_states": _marked(resized(embeds, text, side="left"), start)}

    return {"text_encoder": Padding(pad_tokens, last, last), "transformer": Padding(pad_embeds)}


PLUGIN = Family(
    patches=(
        Patch(
            {"_get_glm_embeds": "b972e019c36127fa"},
            _get_glm_embeds,
            known_in="CogView4Pipeline CogView4ControlPipeline",
            paddings=_paddings,
        ),
        Patch(
            {"forward": "6508bc5705ac2dd1", "CogView4TransformerBlock.forward": "835e852928102bff"},
            _forward,
            known_in="CogView4Transformer2DModel",
            around=True,
        ),
        Patch({"__call__": "763821f8b00860fb"}, _attend, known_in="CogView4AttnProcessor"),
    ),
)
