"""FLUX."""

from __future__ import annotations

from diffkiln.families import Family
from diffkiln.models.known_parts import (
    CLIP_L,
    T5_XXL,
    Architecture,
    Part,
    autoencoder,
    clip,
    clip_tokenizer,
    t5_tokenizer,
)

_FLUX_DEV = Architecture(
    "FluxPipeline",
    "bfloat16",
    {
        "scheduler": Part(
            "diffusers",
            "FlowMatchEulerDiscreteScheduler",
            {
                "num_train_timesteps": 1000,
                "shift": 3.0,
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 1.15,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
            },
        ),
        "text_encoder": clip(CLIP_L),
        "text_encoder_2": Part("transformers", "T5EncoderModel", T5_XXL),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": Part(
            "diffusers",
            "FluxTransformer2DModel",
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
        ),
        "vae": autoencoder(16, 1024, quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True),
    },
    {},
)

PLUGIN = Family(architectures={"flux.1-dev": _FLUX_DEV})
