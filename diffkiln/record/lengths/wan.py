"""Wan and its kin: the text encoder's result is cut to the prompt and padded with zeros."""

from __future__ import annotations

import sys
from typing import Any

import torch

from diffkiln.record.lengths.rewriting import Rewrite


def _get_t5_prompt_embeds(
    self: Any,
    prompt: Any = None,
    num_videos_per_prompt: int = 1,
    max_sequence_length: int = 226,
    device: Any = None,
    dtype: Any = None,
) -> torch.Tensor:
    """Zeros are written where diffusers cuts and pads with zeros: the same bits."""
    clean = sys.modules[type(self).__module__].prompt_clean
    prompts = [clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    tokens = self.tokenizer(
        prompts,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    embeds = self.text_encoder(tokens.input_ids, mask).last_hidden_state
    embeds = embeds.to(dtype=dtype or self.text_encoder.dtype, device=device or self._execution_device)
    lengths = mask.gt(0).sum(dim=1, keepdim=True)
    within = torch.arange(max_sequence_length, device=lengths.device) < lengths
    embeds = embeds.masked_fill(~within.unsqueeze(-1).to(embeds.device), 0.0)
    embeds = embeds.repeat(1, num_videos_per_prompt, 1)
    return embeds.view(len(prompts) * num_videos_per_prompt, max_sequence_length, -1)


REWRITES = (
    Rewrite(
        owners=(
            "pipelines.wan.pipeline_wan:WanPipeline",
            "pipelines.wan.pipeline_wan_vace:WanVACEPipeline",
            "pipelines.skyreels_v2.pipeline_skyreels_v2:SkyReelsV2Pipeline",
            "pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing:SkyReelsV2DiffusionForcingPipeline",
            "pipelines.anyflow.pipeline_anyflow:AnyFlowPipeline",
            "pipelines.anyflow.pipeline_anyflow_far:AnyFlowFARPipeline",
            "pipelines.lucy.pipeline_lucy_edit:LucyEditPipeline",
            "pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing_i2v:"
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing_v2v:"
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "pipelines.wan.pipeline_wan_video2video:WanVideoToVideoPipeline",
        ),
        method="_get_t5_prompt_embeds",
        prints={"_get_t5_prompt_embeds": "6aceaece50aeec7c"},
        replacement=_get_t5_prompt_embeds,
    ),
    Rewrite(  # which differ in the default of max_sequence_length
        owners=(
            "pipelines.wan.pipeline_wan_i2v:WanImageToVideoPipeline",
            "pipelines.skyreels_v2.pipeline_skyreels_v2_i2v:SkyReelsV2ImageToVideoPipeline",
        ),
        method="_get_t5_prompt_embeds",
        prints={"_get_t5_prompt_embeds": "ecd9d18eb4da28fa"},
        replacement=_get_t5_prompt_embeds,
    ),
)
