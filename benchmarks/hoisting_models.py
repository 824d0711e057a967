"""Full-size denoisers by their published configurations, and the arguments that their pipelines give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Argument:
    """A tensor among the arguments: what it depends on ("latents", "request", "schedule", "constant") and its shape."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = DTYPE

    def tensor(self) -> torch.Tensor:
        if self.kind == "constant":
            return torch.zeros(self.shape, dtype=self.dtype)
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Denoiser:
    """A class of diffusers, its configuration where that is not the class's default, and its arguments."""

    kind: str
    arguments: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)


def _latents(*shape: int) -> Argument:
    return Argument("latents", shape)


def _request(*shape: int, dtype: torch.dtype = DTYPE) -> Argument:
    return Argument("request", shape, dtype)


def _time(*shape: int, dtype: torch.dtype = DTYPE) -> Argument:
    return Argument("schedule", shape, dtype)


def _constant(*shape: int) -> Argument:
    return Argument("constant", shape)


def _flux(text: int, width: int, pooled: bool, guidance: bool, ids: int, image: int = 64) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden_states": _latents(1, 4096, image),
        "encoder_hidden_states": _request(1, text, width),
        "timestep": _time(1),
        "img_ids": _constant(4096, ids),
        "txt_ids": _constant(text, ids),
    }
    arguments |= {"pooled_projections": _request(1, 768)} if pooled else {}
    arguments |= {"guidance": _request(1)} if guidance else {}
    return arguments | {"return_dict": False}


_UNET = {"layers_per_block": 2, "sample_size": 128, "block_out_channels": (320, 640, 1280)}
_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}

MODELS: dict[str, Denoiser] = {
    "FLUX.1-dev": Denoiser("FluxTransformer2DModel", _flux(512, 4096, True, True, 3), {"guidance_embeds": True}),
    "FLUX.2-dev": Denoiser("Flux2Transformer2DModel", _flux(512, 15360, False, True, 4, 128)),
    "Chroma": Denoiser("ChromaTransformer2DModel", _flux(512, 4096, False, False, 3)),
    "SD3.5-large": Denoiser(
        "SD3Transformer2DModel",
        {
            "hidden_states": _latents(2, 16, 128, 128),
            "encoder_hidden_states": _request(2, 333, 4096),
            "pooled_projections": _request(2, 2048),
            "timestep": _time(2, dtype=torch.float32),
            "return_dict": False,
        },
        {
            "sample_size": 128,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Qwen-Image": Denoiser(
        "QwenImageTransformer2DModel",
        {
            "hidden_states": _latents(1, 4096, 64),
            "encoder_hidden_states": _request(1, 512, 3584),
            "timestep": _time(1),
            "img_shapes": [[(1, 64, 64)]],
            "return_dict": False,
        },
    ),
    "AuraFlow": Denoiser(
        "AuraFlowTransformer2DModel",
        {
            "hidden_states": _latents(2, 4, 128, 128),
            "encoder_hidden_states": _request(2, 256, 2048),
            "timestep": _time(2),
            "return_dict": False,
        },
        {"sample_size": 128, "pos_embed_max_size": 9216},
    ),
    "Wan 2.1 14B": Denoiser(
        "WanTransformer3DModel",
        {
            "hidden_states": _latents(1, 16, 5, 60, 104),
            "timestep": _time(1, dtype=torch.int64),
            "encoder_hidden_states": _request(1, 512, 4096),
            "return_dict": False,
        },
    ),
    "HunyuanVideo": Denoiser(
        "HunyuanVideoTransformer3DModel",
        {
            "hidden_states": _latents(1, 16, 5, 60, 104),
            "timestep": _time(1, dtype=torch.int64),
            "encoder_hidden_states": _request(1, 256, 4096),
            "encoder_attention_mask": _request(1, 256),
            "pooled_projections": _request(1, 768),
            "guidance": _request(1),
            "return_dict": False,
        },
    ),
    "CogVideoX-5B": Denoiser(
        "CogVideoXTransformer3DModel",
        {
            "hidden_states": _latents(2, 5, 16, 60, 90),
            "encoder_hidden_states": _request(2, 226, 4096),
            "timestep": _time(2, dtype=torch.int64),
            "image_rotary_emb": (_constant(6750, 64), _constant(6750, 64)),
            "return_dict": False,
        },
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "LTX-Video": Denoiser(
        "LTXVideoTransformer3DModel",
        {
            "hidden_states": _latents(2, 1024, 128),
            "encoder_hidden_states": _request(2, 128, 4096),
            "timestep": _time(2),
            "encoder_attention_mask": _request(2, 128),
            "num_frames": 4,
            "height": 16,
            "width": 16,
            "return_dict": False,
        },
    ),
    "PixArt-Σ": Denoiser(
        "PixArtTransformer2DModel",
        {
            "hidden_states": _latents(2, 4, 128, 128),
            "encoder_hidden_states": _request(2, 300, 4096),
            "encoder_attention_mask": _request(2, 300),
            "timestep": _time(2, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        },
        {"use_additional_conditions": False},
    ),
    "SDXL": Denoiser(
        "UNet2DConditionModel",
        {
            "sample": _latents(2, 4, 128, 128),
            "timestep": _time(dtype=torch.float32),
            "encoder_hidden_states": _request(2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": _request(2, 1280), "time_ids": _constant(2, 6)},
            "return_dict": False,
        },
        _UNET | _SDXL,
    ),
    "SD 1.5": Denoiser(
        "UNet2DConditionModel",
        {
            "sample": _latents(2, 4, 64, 64),
            "timestep": _time(dtype=torch.int64),
            "encoder_hidden_states": _request(2, 77, 768),
            "return_dict": False,
        },
        _SD15,
    ),
}
