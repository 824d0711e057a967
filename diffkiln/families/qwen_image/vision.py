"""Qwen 2.5 VL with still images: where images stand in the text, and what of them attends to what, is read off tensors.

A program gives the grids of the patches as numbers. All that follows from them is known while it is recorded, so that
the same operations are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffkiln.record.patches import Patch


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the tokens that stand for images by the vision tower's results, row by row, in order."""

    def forward(self: Any, input_ids: Any = None, *args: Any, image_grid_thw: Any = None, **kwargs: Any) -> Any:
        if not isinstance(image_grid_thw, tuple):
            return original(self, input_ids, *args, image_grid_thw=image_grid_thw, **kwargs)
        embeds = self.get_input_embeddings()(input_ids)
        seen = _seen(self.visual, kwargs.pop("pixel_values"), image_grid_thw).to(embeds.dtype)
        seen = seen.view(embeds.shape[0], -1, embeds.shape[-1])
        stands_for = input_ids.eq(self.config.image_token_id)
        index = (stands_for.cumsum(dim=1) - 1).clamp(min=0, max=seen.shape[1] - 1)
        seen = seen.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        embeds = torch.where(stands_for.unsqueeze(-1), seen, embeds)
        return original(self, None, *args, **kwargs | {"inputs_embeds": embeds})

    return forward


def _seen(tower: Any, pixels: torch.Tensor, grids: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    """Returns [tokens, channels] of all images, with numbers for the ends of the spans that attend to each other."""
    from transformers.vision_utils import get_vision_attention_seqlens, get_vision_window_index

    grid = torch.tensor(grids)
    whole, _ = get_vision_attention_seqlens(grid, tower.config)
    index, windows = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    ends = {"cu_seqlens": tuple(whole.tolist()), "cu_window_seqlens": tuple(windows.tolist())}
    return tower(pixels.type(tower.dtype), grid_thw=grid, window_index=index, **ends).pooler_output


def _attend(original: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the ends to attention as numbers; a tensor given to a block would hide them."""

    def forward(self: Any, hidden_states: torch.Tensor, cu_seqlens: Any, **kwargs: Any) -> Any:
        ends = torch.tensor(cu_seqlens) if isinstance(cu_seqlens, tuple) else cu_seqlens
        return original(self, hidden_states, ends, **kwargs)

    return forward


PATCHES = (
    Patch(
        {
            "forward": "971e540da3cd8303",
            "get_image_features": "3be50ff2e7181acb",
            "get_placeholder_mask": "a02007ef3cdd6b4f",
            "compute_3d_position_ids": "c81e25693ccfca40",
            "Qwen2_5_VisionTransformerPretrainedModel.forward": "e71361c82c550238",
        },
        _forward,
        known_in="Qwen2_5_VLModel",
        around=True,
    ),
    Patch({"forward": "73bafba8a509f6b2"}, _attend, known_in="Qwen2_5_VLVisionAttention", around=True),
)


def is_replaced(text_encoder: torch.nn.Module) -> bool:
    """Returns True if the encoder's methods are replaced now, as they are those that the patches were made for."""
    forwards = {type(part).forward for part in text_encoder.modules()}
    return sum(forward.__module__ == __name__ for forward in forwards) == len(PATCHES)
