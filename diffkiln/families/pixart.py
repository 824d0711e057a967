"""PixArt."""

from __future__ import annotations

from diffkiln.families import Family
from diffkiln.models.known_parts import T5_XXL, Architecture, Part, autoencoder, t5_tokenizer

_PIXART_SIGMA = Architecture(
    "PixArtSigmaPipeline",
    "float32",
    {
        "scheduler": Part(
            "diffusers",
            "DPMSolverMultistepScheduler",
            {
                "beta_start": 0.0001,
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "num_train_timesteps": 1000,
                "algorithm_type": "dpmsolver++",
                "solver_type": "midpoint",
                "solver_order": 2,
            },
        ),
        "text_encoder": Part("transformers", "T5EncoderModel", T5_XXL),
        "tokenizer": t5_tokenizer(),
        "transformer": Part(
            "diffusers",
            "PixArtTransformer2DModel",
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "attention_head_dim": 72,
                "num_attention_heads": 16,
                "cross_attention_dim": 1152,
                "caption_channels": 4096,
                "interpolation_scale": 2,
                "use_additional_conditions": False,
            },
        ),
        "vae": autoencoder(4, 1024, scaling_factor=0.13025, force_upcast=True),
    },
    {},
)

PLUGIN = Family(architectures={"pixart-sigma-1024": _PIXART_SIGMA})
