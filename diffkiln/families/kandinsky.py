"""Kandinsky 2, 3 and 5.

Kandinsky 2: the mask of inpainting is widened pixel by pixel, in a loop that reads each.

Kandinsky 3: prompts and negative prompts are cut one token behind the longest prompt, and the denoiser takes the
mean of what is left.

Kandinsky 5: refused, as no length can be fixed by what the other families have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from diffkiln.errors import DataDependent
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized

#: What diffusers pads prompts to.
_TEXT = 128
#: What the denoiser adds to the scores of tokens that its mask leaves out; twice that, of those that diffusers cuts.
_BIAS = -10000.0


def _prepare_mask(masks: torch.Tensor) -> torch.Tensor:
    """Returns [batch, 1, height, width]: zero where a pixel, or one of six beside it, is not 1.

    The six are those that diffusers' loop looks at: above, below, left, right, and two of the four corners.
    """
    kept = functional.pad(masks[:, :1].eq(1), (1, 1, 1, 1), value=True)
    height, width = masks.shape[-2:]
    for down, right in ((0, 1), (1, 0), (0, 0), (2, 1), (1, 2), (2, 2)):
        beside = kept[..., down : down + height, right : right + width]
        masks = masks.masked_fill(~beside, 0)
    return masks


def _process_embeds(
    _self: Any, embeddings: torch.Tensor, attention_mask: torch.Tensor, cut_context: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes zeros into the padding, and cuts nothing."""
    if cut_context:
        embeddings = embeddings.masked_fill(attention_mask.eq(0).unsqueeze(-1), 0.0)
    return embeddings, attention_mask


def _encode_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds a channel to both texts for the tokens that diffusers would have, up to the longest prompt's length."""

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, negative, mask, negative_mask = original(self, *args, **kwargs)
        if not kwargs.get("_cut_context") or kwargs.get("prompt_embeds") is not None:
            return embeds, negative, mask, negative_mask
        length = mask.sum(-1).max() + 1
        embeds = _marked(embeds, length)
        if negative is not None:
            negative = _marked(negative, length)
            negative_mask = negative_mask.masked_fill(torch.arange(_TEXT, device=mask.device) >= length, 0)
        return embeds, negative, mask, negative_mask

    return encode_prompt


def _marked(embeds: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Returns [batch, tokens, channels + 1]: zeros from the length on, and a last channel that is one before it."""
    within = (torch.arange(embeds.shape[1], device=embeds.device) < length).unsqueeze(-1)
    channel = within.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
    return torch.cat([embeds.masked_fill(~within, 0.0), channel], dim=-1)


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the denoiser's own forward, with a mask of -1 where the text's last channel shows no token."""

    def forward(
        self: Any,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        text, mask = encoder_hidden_states, encoder_attention_mask
        if text is not None and mask is not None and text.shape[-1] == self.config.encoder_hid_dim + 1:
            within, text = text[..., -1].gt(0.5), text[..., :-1]
            mask = mask.to(sample.dtype).masked_fill(~within, -1.0)
        return original(self, sample, timestep, text, mask, **kwargs)

    return forward


def _pool(self: Any, x: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor) -> torch.Tensor:
    """Averages the tokens that diffusers has, of which some may be padding."""
    bias = context_mask.to(dtype=context.dtype)
    within = bias.gt(1.5 * _BIAS).transpose(1, 2)
    count = within.sum(dim=1, keepdim=True)
    dtype = torch.promote_types(context.dtype, torch.float32)
    mean = context.masked_fill(~within, 0.0).sum(dim=1, keepdim=True, dtype=dtype) / count
    pooled = self.attention(mean.to(context.dtype), context, bias)
    return x + pooled.squeeze(1)


def _paddings(_pipe: Any, _fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the denoiser's padding, which follows the prompt's length."""

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
        marked = _marked(resized(text, _TEXT), torch.tensor(text.shape[1]))
        return args, kwargs | {"encoder_hidden_states": marked, "encoder_attention_mask": resized(mask, _TEXT)}

    return {"unet": Padding(pad)}


def _encode_prompt_qwen(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    raise DataDependent(
        f"the text encoder and the denoiser of {type(self).__name__} take as many tokens as the longest prompt has, "
        "without a mask, and a long prompt is cut by the characters that its last tokens decode to, so that shapes and "
        "text follow the prompt. No keyword of the call changes that"
    )


PLUGIN = Family(
    patches=(
        Patch(
            {"prepare_mask": "7a009e51c0cb2963"},
            _prepare_mask,
            known_in="KandinskyInpaintPipeline KandinskyV22InpaintPipeline",
            function=True,
            outside=True,
        ),
        Patch(
            {"process_embeds": "43833d2d4d59efb3"}, _process_embeds, known_in="Kandinsky3Pipeline", paddings=_paddings
        ),
        Patch({"encode_prompt": "3aa95208ce841ff0"}, _encode_prompt, known_in="Kandinsky3Pipeline", around=True),
        Patch({"forward": "ac635d50c006c84a"}, _forward, known_in="Kandinsky3UNet", around=True),
        Patch({"forward": "e8d4d762a31702d1"}, _pool, known_in="Kandinsky3AttentionPooling"),
        Patch(
            {"_encode_prompt_qwen": "fabe41311900017e ff8d0f233a6d0202"},
            _encode_prompt_qwen,
            known_in="Kandinsky5T2VPipeline Kandinsky5I2VPipeline Kandinsky5T2IPipeline",
            refuses=True,
            uncounted=True,
        ),
    ),
)
