"""ERNIE-Image: each prompt is encoded by itself, as long as it is, out of tokens in Python lists; a language model may
rewrite it before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized

#: Tokens to which prompts are padded at most. Tokenizers that have no limit say some huge number.
_LONGEST = 8192


def _enhance_prompt_with_pe(_self: Any, *_args: Any, **_kwargs: Any) -> str:
    raise RecordError(
        "ErnieImagePipeline has a language model write the prompt anew, word by word, which is no straight line of "
        'operations. Set "use_pe" to false in inputs.call, and rewrite prompts before they are given to the bundle'
    )


def _encode_prompt(self: Any, prompt: Any, device: Any, num_images_per_prompt: int = 1) -> list[torch.Tensor]:
    """Returns every token that the tokenizer may give, with a last channel of ones for those that count.

    The text encoder is causal and the tokens are padded on the right, so no token that counts sees the padding. Its
    results for the padding are zeroed.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    rows = _encode(self.text_encoder, self.tokenizer, prompts, device)
    return [row for row in rows for _ in range(num_images_per_prompt)]


def _encode(text_encoder: Any, tokenizer: Any, prompt: list[str], device: Any) -> list[torch.Tensor]:
    """Does so for the pipeline and for the modular pipeline's block of text."""
    length = _text_length(tokenizer)
    rows = []
    for text in prompt:
        tokens = tokenizer(
            text,
            add_special_tokens=True,
            truncation=True,
            padding="max_length",
            max_length=length,
            padding_side="right",
            return_tensors="pt",
        )
        ids, mask = _never_empty(tokens.input_ids, tokens.attention_mask, tokenizer.bos_token_id)
        hidden = text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-2][0]
        counted = mask[0].unsqueeze(-1)
        rows.append(torch.cat([hidden.masked_fill(counted.eq(0), 0.0), counted.to(hidden.dtype)], dim=-1))
    return rows


def _text_length(tokenizer: Any) -> int:
    length = tokenizer.model_max_length
    if length > _LONGEST:
        raise RecordError(
            f"the tokenizer of ErnieImagePipeline takes prompts of up to {length} tokens, and all would be padded to "
            f'that. Set "model_max_length" in tokenizer/tokenizer_config.json to at most {_LONGEST}; 512, say'
        )
    if tokenizer.pad_token_id is None:
        raise RecordError(
            "the tokenizer of ErnieImagePipeline has no token for padding. Set "
            '"pad_token" in tokenizer/tokenizer_config.json to any of its tokens: the model does not see it'
        )
    return length


def _never_empty(ids: torch.Tensor, mask: torch.Tensor, bos: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives a prompt [1, tokens] without tokens the first token that diffusers gives it."""
    is_first = torch.arange(ids.shape[1], device=ids.device).eq(0)
    missing = mask.sum().eq(0).logical_and(is_first)
    return ids.masked_fill(missing, bos or 0), mask.masked_fill(missing, 1)


def _pad_text(
    text_hiddens: list[torch.Tensor], device: Any, dtype: torch.dtype, text_in_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the texts, which have one length already, and the number of tokens that count, from the last channel."""
    joined = torch.stack(text_hiddens).to(device)
    return joined[..., :text_in_dim].to(dtype), joined[..., text_in_dim].gt(0.5).sum(dim=1)


def _paddings(pipe: Any, _fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length."""
    length, pad_id = _text_length(pipe.tokenizer), pipe.tokenizer.pad_token_id

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"input_ids": resized(kwargs["input_ids"], length, pad_id)}

    def cut(tensor: torch.Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, kwargs["input_ids"].shape[1]) if tensor.ndim == 3 else tensor

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"text_bth": resized(kwargs["text_bth"], length)}

    return {"text_encoder": Padding(pad_tokens, cut, cut), "transformer": Padding(pad_embeds)}


PLUGIN = Family(
    patches=(
        Patch({"encode_prompt": "dfd0050c1c3d1bbd"}, _encode_prompt, known_in="ErnieImagePipeline", paddings=_paddings),
        Patch({"_pad_text": "4d56facd99590c5c"}, staticmethod(_pad_text), known_in="ErnieImagePipeline"),
        Patch(
            {"_encode": "8e97fdf71268e776"},
            staticmethod(_encode),
            known_in="ErnieImageTextEncoderStep",
            paddings=_paddings,
        ),
        Patch({"_pad_text": "b72c3bd857949068"}, _pad_text, known_in="ErnieImageTextInputStep", function=True),
        Patch(
            {"_enhance_prompt_with_pe": "e5e6abf5cfd02c37"},
            _enhance_prompt_with_pe,
            known_in="ErnieImagePipeline",
            refuses=True,
        ),
    ),
)
