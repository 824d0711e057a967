"""Bria and Bria FIBO.

Bria: each prompt is encoded by itself, as long as it is, and filled up with zeros; and a negative prompt that is
empty is not encoded, which is decided by reading it.

Bria FIBO: prompts and negative prompts are as long as the longest of each, the shorter are filled up with zeros; an
empty prompt is a token of its own; and whether all tokens count is decided by reading the mask. To edit an image, the
prompt is JSON, which a recording's is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized
from diffkiln.record.text import demand, is_sentinel

#: The token that FIBO has for an empty prompt.
_EMPTY = 128000


def _get_t5_prompt_embeds(
    self: Any, prompt: Any = None, num_images_per_prompt: int = 1, max_sequence_length: int = 128, device: Any = None
) -> torch.Tensor:
    """Hides the padding from the text encoder, and writes zeros over its results there."""
    rows = []
    for text in [prompt] if isinstance(prompt, str) else prompt:
        tokens = _tokens(self, text, max_sequence_length)
        embeds = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        rows.append(embeds.masked_fill(tokens.attention_mask.eq(0).unsqueeze(-1), 0.0))
    embeds = torch.cat(rows).repeat(1, num_images_per_prompt, 1)
    embeds = embeds.view(len(rows) * num_images_per_prompt, max_sequence_length, -1)
    return embeds.to(dtype=self.transformer.dtype)


def _encode_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns zeros for negative prompts whose first is empty; the tokens tell.

    A prompt of white space alone also counts as empty if the tokenizer drops it.
    """

    def encode_prompt(self: Any, prompt: Any, *args: Any, max_sequence_length: int = 128, **kwargs: Any) -> Any:
        negatives = kwargs.get("negative_prompt")
        embeds, negative, ids = original(self, prompt, *args, max_sequence_length=max_sequence_length, **kwargs)
        first = negatives[0] if isinstance(negatives, list) else negatives
        if negative is not None and first:
            given, nothing = (_tokens(self, text, max_sequence_length).input_ids for text in (first, ""))
            negative = negative.masked_fill(given.eq(nothing).all(), 0.0)
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


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the text encoder's padding: it follows the prompt's length."""
    text, pad_id = fixed["max_sequence_length"], pipe.tokenizer.pad_token_id

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (ids,) = args
        return (resized(ids, text, pad_id),), kwargs | {"attention_mask": resized(torch.ones_like(ids), text)}

    def cut(tensor: torch.Tensor, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, args[0].shape[1])

    return {"text_encoder": Padding(pad, cut, cut)}


def _get_fibo_embeds(
    self: Any,
    prompt: Any,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = 2048,
    device: Any = None,
    dtype: Any = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Returns embeddings of `max_sequence_length` tokens, zeros where diffusers has none. Empty prompts are told by
    tokens.

    One more channel of the embeddings says which tokens count. The mask is a constant that counts none of them, so that
    the call has a mask whatever the prompts are; the denoiser takes the channel's.
    """
    if self.tokenizer.padding_side != "right":
        raise RecordError("the tokenizer of BriaFiboPipeline pads on the left: where a prompt begins is not fixed")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    options = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True, "return_tensors": "pt"}
    tokens = self.tokenizer(prompts, add_special_tokens=True, **options)
    nothing = self.tokenizer("", add_special_tokens=True, **options).input_ids
    is_empty = tokens.input_ids.eq(nothing).all(dim=1, keepdim=True)
    pad_id = self.tokenizer.pad_token_id
    ids, mask, longest = _with_empty_ones(tokens.input_ids, tokens.attention_mask, is_empty, pad_id)
    hidden = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    within = (torch.arange(max_sequence_length, device=ids.device) < longest).unsqueeze(-1)
    layers = tuple(each.masked_fill(~within, 0.0).repeat_interleave(num_images_per_prompt, dim=0) for each in hidden)
    embeds = torch.cat([layers[-1], layers[-2]], dim=-1).to(dtype=dtype or self.text_encoder.dtype)
    counted = mask.repeat_interleave(num_images_per_prompt, dim=0)
    none = torch.zeros(embeds.shape[:2], dtype=mask.dtype, device=ids.device)
    return _marked(embeds, counted), layers, none


def _with_empty_ones(
    ids: torch.Tensor, mask: torch.Tensor, is_empty: torch.Tensor, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token ids and mask [prompts, tokens] as diffusers has them, and the longest prompt's length.

    An empty prompt is one token, or as many as the longest prompt beside it has.
    """
    longest = mask.sum(dim=1).max().masked_fill(is_empty.all(), 1)
    filled = is_empty.logical_and(torch.arange(ids.shape[1], device=ids.device) < longest)
    ids = ids.masked_fill(is_empty, pad_id).masked_fill(filled, _EMPTY)
    return ids, torch.where(is_empty, filled.to(mask.dtype), mask), longest


def _marked(embeds: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    return torch.cat([embeds, counted.unsqueeze(-1).to(embeds.dtype)], dim=-1)


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the denoiser's own forward, with the last channel of the text as its mask."""

    def forward(self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if encoder_hidden_states.shape[-1] == self.config.joint_attention_dim + 1:
            counted = encoder_hidden_states[..., -1].gt(0.5)
            encoder_hidden_states = encoder_hidden_states[..., :-1]
            latents = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            mask = torch.cat([counted, latents], dim=1)[:, None, None, :]
            kwargs["joint_attention_kwargs"] = {**kwargs["joint_attention_kwargs"], "attention_mask": mask}
        return original(self, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)

    return forward


def _fibo_paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
    text, pad_id = fixed["max_sequence_length"], pipe.tokenizer.pad_token_id

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (ids,) = args
        return (resized(ids, text, pad_id),), kwargs | {"attention_mask": resized(kwargs["attention_mask"], text)}

    def cut(tensor: torch.Tensor, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, args[0].shape[1]) if tensor.ndim == 3 else tensor

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds, latents = kwargs["encoder_hidden_states"], kwargs["hidden_states"].shape[1]
        batch, length, _ = embeds.shape
        mask = kwargs["joint_attention_kwargs"].get("attention_mask")
        counted = torch.ones(batch, length) if mask is None else mask[:, 0, 0, :length]
        none = torch.ones(batch, text + latents, dtype=torch.bool)
        none[:, :text] = False
        return args, kwargs | {
            "encoder_hidden_states": _marked(resized(embeds, text), resized(counted, text)),
            "text_encoder_layers": [resized(layer, text) for layer in kwargs["text_encoder_layers"]],
            "txt_ids": kwargs["txt_ids"].new_zeros(text, 3),
            "joint_attention_kwargs": {**kwargs["joint_attention_kwargs"], "attention_mask": none[:, None, None, :]},
        }

    return {"text_encoder": Padding(pad_tokens, cut, cut), "transformer": Padding(pad_embeds)}


def _is_edit(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Takes the prompts of a recording, which are not JSON, for an edit; the runtime refuses what is none."""

    def is_edit(prompt: Any) -> bool:
        if not is_sentinel(prompt):
            return original(prompt)
        demand("form", "edit_json")
        return True

    return is_edit


PLUGIN = Family(
    patches=(
        Patch(
            {"_get_t5_prompt_embeds": "736b5caac3b87726"},
            _get_t5_prompt_embeds,
            known_in="BriaPipeline",
            paddings=_paddings,
        ),
        Patch({"encode_prompt": "039485c44da9b27b"}, _encode_prompt, known_in="BriaPipeline", around=True),
        Patch(
            {
                "get_prompt_embeds": "eb7845e73bbd2e08",
                "encode_prompt": "8bee0bfe0d6cf6b4",
                "pad_embedding": "8cd6acdb77fd2538",
            },
            _get_fibo_embeds,
            known_in="BriaFiboPipeline",
            paddings=_fibo_paddings,
        ),
        Patch(
            {"is_valid_edit_json": "20976d57d9f9b93c"},
            _is_edit,
            known_in="BriaFiboEditPipeline",
            function=True,
            around=True,
        ),
        Patch({"forward": "3cacc780c1e116d7"}, _forward, known_in="BriaFiboTransformer2DModel", around=True),
    ),
)
