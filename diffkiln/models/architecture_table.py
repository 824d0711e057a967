"""Configurations of known models, as their publishers give them on the Hub: shapes and settings, no weights.

Values that equal the default of the class are left out where the class has one made for that very model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Config = dict[str, Any]


class Part(NamedTuple):
    """One component: library, class and configuration. A tokenizer's configuration is that of its stand-in."""

    library: str
    kind: str
    config: Config


class Architecture(NamedTuple):
    """A pipeline: its class, the type its weights are published in, its components and its own settings."""

    pipeline: str
    dtype: str
    parts: dict[str, Part]
    settings: Config


def _clip_config(model_type: str, width: int, layers: int, heads: int, act: str) -> Config:
    return {
        "model_type": model_type,
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "layer_norm_eps": 1e-05,
        # Not the tokenizer's ids, but what was published: with 2, the end of the text is where the id is largest.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


_CLIP_L = _clip_config("clip_text_model", 768, 12, 12, "quick_gelu")
_CLIP_G = _clip_config("clip_text_model", 1280, 32, 20, "gelu")
_T5_XXL: Config = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _clip(config: Config, *, projection: bool = False) -> Part:
    return Part("transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", config)


def _clip_tokenizer(pad: str = "<|endoftext|>") -> Part:
    return Part("transformers", "CLIPTokenizer", {"pad_token": pad, "model_max_length": 77})


def _t5_tokenizer() -> Part:
    return Part("transformers", "T5Tokenizer", {"extra_ids": 100, "model_max_length": 512})


def _vae(channels: int, sample_size: int, *, quant_conv: bool = True, **config: Any) -> Part:
    shape: Config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": channels,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": sample_size,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
    return Part("diffusers", "AutoencoderKL", shape | config)


_DIFFUSION_BETAS: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}

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
        "text_encoder": _clip(_CLIP_L),
        "text_encoder_2": Part("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _t5_tokenizer(),
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
        "vae": _vae(16, 1024, quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True),
    },
    {},
)

_SDXL_BASE = Architecture(
    "StableDiffusionXLPipeline",
    "float32",
    {
        "scheduler": Part("diffusers", "EulerDiscreteScheduler", {**_DIFFUSION_BETAS, "timestep_spacing": "leading"}),
        "text_encoder": _clip(_CLIP_L),
        "text_encoder_2": _clip(_CLIP_G, projection=True),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer("!"),
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
        "vae": _vae(4, 1024, scaling_factor=0.13025, force_upcast=True),
    },
    {"force_zeros_for_empty_prompt": True},
)

_SD_15 = Architecture(
    "StableDiffusionPipeline",
    "float32",
    {
        "scheduler": Part(
            "diffusers", "PNDMScheduler", {**_DIFFUSION_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
        ),
        "text_encoder": _clip(_CLIP_L),
        "tokenizer": _clip_tokenizer(),
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
        "vae": _vae(4, 512, scaling_factor=0.18215),
    },
    {"requires_safety_checker": False},
)

_SD35_MEDIUM = Architecture(
    "StableDiffusion3Pipeline",
    "bfloat16",
    {
        "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
        "text_encoder": _clip(_CLIP_L, projection=True),
        "text_encoder_2": _clip(_CLIP_G, projection=True),
        "text_encoder_3": Part("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer("!"),
        "tokenizer_3": _t5_tokenizer(),
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
        "vae": _vae(16, 1024, quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True),
    },
    {},
)

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
        "text_encoder": Part("transformers", "T5EncoderModel", _T5_XXL),
        "tokenizer": _t5_tokenizer(),
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
        "vae": _vae(4, 1024, scaling_factor=0.13025, force_upcast=True),
    },
    {},
)

_UMT5_XXL: Config = {**_T5_XXL, "model_type": "umt5", "vocab_size": 256384}


def _wan(transformer: Config, *, experts: int = 1, **settings: Any) -> Architecture:
    """Wan 2.x, text to video. 2.2 has two experts, one for the early steps and one for the late."""
    denoiser = Part("diffusers", "WanTransformer3DModel", transformer)
    names = ["transformer", "transformer_2"][:experts]
    return Architecture(
        "WanPipeline",
        "bfloat16",
        {
            "scheduler": Part(
                "diffusers",
                "UniPCMultistepScheduler",
                {
                    "num_train_timesteps": 1000,
                    "prediction_type": "flow_prediction",
                    "use_flow_sigmas": True,
                    "flow_shift": 3.0,
                },
            ),
            "text_encoder": Part("transformers", "UMT5EncoderModel", _UMT5_XXL),
            "tokenizer": Part("transformers", "T5Tokenizer", {"extra_ids": 300, "model_max_length": 512}),
            **dict.fromkeys(names, denoiser),
            "vae": Part("diffusers", "AutoencoderKLWan", {"base_dim": 96, "z_dim": 16}),
        },
        settings,
    )


_WAN_14B: Config = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
_WAN_1_3B: Config = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}

_QWEN_IMAGE = Architecture(
    "QwenImagePipeline",
    "bfloat16",
    {
        "scheduler": Part(
            "diffusers",
            "FlowMatchEulerDiscreteScheduler",
            {
                "num_train_timesteps": 1000,
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
                "base_shift": 0.5,
                "max_shift": 0.9,
                "base_image_seq_len": 256,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
        ),
        "text_encoder": Part(
            "transformers",
            "Qwen2_5_VLForConditionalGeneration",
            {
                "model_type": "qwen2_5_vl",
                "tie_word_embeddings": False,
                "text_config": {
                    "model_type": "qwen2_5_vl_text",
                    "vocab_size": 152064,
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 128000,
                    "rms_norm_eps": 1e-06,
                    "tie_word_embeddings": False,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                },
                "vision_config": {
                    "model_type": "qwen2_5_vl",
                    "depth": 32,
                    "hidden_size": 1280,
                    "intermediate_size": 3420,
                    "num_heads": 16,
                    "out_hidden_size": 3584,
                    "patch_size": 14,
                    "window_size": 112,
                    "fullatt_block_indexes": [7, 15, 23, 31],
                },
            },
        ),
        "tokenizer": Part("transformers", "Qwen2Tokenizer", {"model_max_length": 131072}),
        "transformer": Part(
            "diffusers",
            "QwenImageTransformer2DModel",
            {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
        ),
        "vae": Part("diffusers", "AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16}),
    },
    {},
)

ARCHITECTURES: dict[str, Architecture] = {
    "flux.1-dev": _FLUX_DEV,
    "sdxl-base-1.0": _SDXL_BASE,
    "sd-1.5": _SD_15,
    "sd3.5-medium": _SD35_MEDIUM,
    "pixart-sigma-1024": _PIXART_SIGMA,
    "wan2.1-t2v-1.3b": _wan(_WAN_1_3B),
    "wan2.1-t2v-14b": _wan(_WAN_14B),
    "wan2.2-t2v-a14b": _wan(_WAN_14B, experts=2, boundary_ratio=0.875),
    "qwen-image": _QWEN_IMAGE,
}
