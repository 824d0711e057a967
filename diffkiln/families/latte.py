"""Latte: the text of a single prompt, and of its negative prompt, is cut to the prompt's length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch, resized

#: What diffusers pads prompts to.
_TEXT = 120


def _mask_text_embeddings(self: Any, emb: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns [1, 1, tokens, channels + 1] of a single prompt: zeros where diffusers cuts, and a channel that marks
    them.

    Several prompts keep their length in diffusers, with zeros in the padding that the denoiser sees.
    """
    length = emb.shape[2]
    if emb.shape[0] > 1:
        return emb * mask[:, None, :, None], length
    within = torch.arange(length, device=mask.device) < mask.sum()
    return _marked(emb, within.unsqueeze(-1)), length


def _marked(embeds: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    channel = within.to(embeds.dtype).expand(*embeds.shape[:-1], 1)
    return torch.cat([embeds.masked_fill(~within, 0.0), channel], dim=-1)


def _encode_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the negative prompt the channel of the prompt, whose length it is cut to."""

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, negative = original(self, *args, **kwargs)
        if negative is not None and embeds.shape[-1] == negative.shape[-1] + 1:
            negative = _marked(negative, embeds[..., -1:].gt(0.5))
        return embeds, negative

    return encode_prompt


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the denoiser's own forward, with the last channel of the text as the mask of its cross-attention."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        text = encoder_hidden_states
        if text is not None and text.shape[-1] == self.config.caption_channels + 1:
            batch, length, _ = text.shape
            frames = hidden_states.shape[2]
            within = text[..., -1].gt(0.5)[:, None, None, :].expand(batch, frames, 1, length)
            encoder_attention_mask, text = within.flatten(0, 1), text[..., :-1]
        return original(self, hidden_states, timestep, text, encoder_attention_mask, **kwargs)

    return forward


def _paddings(_pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the denoiser's padding, which follows the length of a single prompt."""
    single = 2 if fixed["guidance_scale"] > 1.0 else 1

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = kwargs["encoder_hidden_states"]
        if embeds.shape[0] != single:
            return args, kwargs
        within = torch.arange(_TEXT).unsqueeze(-1) < embeds.shape[1]
        return args, kwargs | {"encoder_hidden_states": _marked(resized(embeds, _TEXT), within)}

    return {"transformer": Padding(pad)} if fixed["mask_feature"] else {}


PLUGIN = Family(
    patches=(
        Patch(
            {"mask_text_embeddings": "689252936e96b1c1"},
            _mask_text_embeddings,
            known_in="LattePipeline",
            paddings=_paddings,
        ),
        Patch({"encode_prompt": "624b0d966d84b4ff"}, _encode_prompt, known_in="LattePipeline", around=True),
        Patch({"forward": "e98d410d47fd165d"}, _forward, known_in="LatteTransformer3DModel", around=True),
    ),
)
