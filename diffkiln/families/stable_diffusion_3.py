"""Stable Diffusion 3.5."""

from __future__ import annotations

from diffkiln.families import Family
from diffkiln.models.known_parts import (
    CLIP_G,
    CLIP_L,
    T5_XXL,
    Architecture,
    Part,
    autoencoder,
    clip,
    clip_tokenizer,
    t5_tokenizer,
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

PLUGIN = Family(architectures={"sd3.5-medium": _SD35_MEDIUM})
