"""Lumina 2: the denoiser joins the valid part of each caption with its image, and reads the length from the mask."""

from __future__ import annotations

from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.record.lengths.rewriting import Rewrite


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """The whole caption stands before the image, and attention does not see its padding.

    Attention knows places by their rotary embeddings alone, so that where a token stands does not matter.
    """
    if attention_kwargs:
        raise RecordError("attention_kwargs of Lumina2Transformer2DModel are not recorded")
    p = self.config.patch_size
    batch, channels, height, width = hidden_states.shape
    rows, columns = height // p, width // p
    text = encoder_hidden_states.shape[1]

    temb, caption = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    lengths = encoder_attention_mask.sum(dim=1, keepdim=True)
    places = torch.arange(text, device=lengths.device).expand(batch, text)
    within = places < lengths
    ids = torch.cat([_caption_ids(places, within), _image_ids(lengths, rows, columns)], dim=1)
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


def _caption_ids(places: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """[batch, text, 3]: the place in the caption, which is 0 in the padding."""
    counted = torch.where(within, places, torch.zeros_like(places))
    return torch.stack([counted, torch.zeros_like(places), torch.zeros_like(places)], dim=-1)


def _image_ids(lengths: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[batch, rows · columns, 3]: the caption's length, and the place in the image."""
    batch, device = lengths.shape[0], lengths.device
    down = torch.arange(rows, device=device).repeat_interleave(columns).expand(batch, -1)
    across = torch.arange(columns, device=device).repeat(rows).expand(batch, -1)
    return torch.stack([lengths.expand(batch, rows * columns), down, across], dim=-1)


REWRITES = (
    Rewrite(
        owners=("models.transformers.transformer_lumina2:Lumina2Transformer2DModel",),
        method="forward",
        prints={"forward": "d875461bb0a16a45", "Lumina2RotaryPosEmbed.forward": "df5ac9b8bf129394"},
        replacement=_forward,
    ),
)
