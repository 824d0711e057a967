"""Stable Diffusion 1.5, XL and 3.5, and the checker of finished images that came with the first."""

from __future__ import annotations

from typing import Any

import torch

from diffkiln.families import Family
from diffkiln.models.known_parts import (
    CLIP_G,
    CLIP_L,
    DIFFUSION_BETAS,
    T5_XXL,
    Architecture,
    Part,
    autoencoder,
    clip,
    clip_tokenizer,
    t5_tokenizer,
)
from diffkiln.record.patches import Patch

_SDXL_BASE = Architecture(
    "StableDiffusionXLPipeline",
    "float32",
    {
        "scheduler": Part("diffusers", "EulerDiscreteScheduler", {**DIFFUSION_BETAS, "timestep_spacing": "leading"}),
        "text_encoder": clip(CLIP_L),
        "text_encoder_2": clip(CLIP_G, projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer("!"),
        "unet": Part(
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "layers_per_block": 2,
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "vae": autoencoder(4, 1024, scaling_factor=0.13025, force_upcast=True),
    },
    {"force_zeros_for_empty_prompt": True},
)

_SD_15 = Architecture(
    "StableDiffusionPipeline",
    "float32",
    {
        "scheduler": Part(
            "diffusers", "PNDMScheduler", {**DIFFUSION_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
        ),
        "text_encoder": clip(CLIP_L),
        "tokenizer": clip_tokenizer(),
        "unet": Part(
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 64,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
                "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
                "layers_per_block": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 768,
            },
        ),
        "vae": autoencoder(4, 512, scaling_factor=0.18215),
    },
    {"requires_safety_checker": False},
)

_SD35_MEDIUM = Architecture(
    "StableDiffusion3Pipeline",
    "bfloat16",
    {
        "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
        "text_encoder": clip(CLIP_L, projection=True),
        "text_encoder_2": clip(CLIP_G, projection=True),
        "text_encoder_3": Part("transformers", "T5EncoderModel", T5_XXL),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer("!"),
        "tokenizer_3": t5_tokenizer(),
        "transformer": Part(
            "diffusers",
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        "vae": autoencoder(16, 1024, quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True),
    },
    {},
)


def _check_images(self: Any, clip_input: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes images black without reading a value: scores are rounded to thousandths, and one above zero counts."""
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

    embeds = self.visual_projection(self.vision_model(clip_input)[1])
    special = cosine_distance(embeds, self.special_care_embeds).float() - self.special_care_embeds_weights.float()
    concepts = cosine_distance(embeds, self.concept_embeds).float() - self.concept_embeds_weights.float()
    stricter = _above_zero(special).any(dim=1, keepdim=True).float() * 0.01
    flags = _above_zero(concepts + stricter).any(dim=1)
    beside = flags.reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(beside, torch.zeros_like(images), images), flags


def _above_zero(scores: torch.Tensor) -> torch.Tensor:
    return torch.round(scores * 1000.0) > 0


PLUGIN = Family(
    patches=(
        Patch({"forward": "b6ce37d892d95250"}, _check_images, known_in="StableDiffusionSafetyChecker", outside=True),
    ),
    architectures={"sdxl-base-1.0": _SDXL_BASE, "sd-1.5": _SD_15, "sd3.5-medium": _SD35_MEDIUM},
)
