"""Video transformers of Wan's kind: one stream, cross-attention to the prompt, and what was made of it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache, WanAnimate2Transformer3DModel

from tests.coverage.registry import Draw, case

TEXT = 8  # tokens of the prompt
WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "rope_max_seq_len": 32,
}


def video(draw: Draw, size: int, channels: int = 4, frames: int = 2) -> dict:
    """Latents of two frames of 8 × 4, or of 16 × 4, and a prompt."""
    return {
        "hidden_states": draw(1, channels, frames, 8 * size, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TEXT, 24),
    }


@case("WanTransformer3DModel")
def wan(draw: Draw, size: int):
    return diffusers.WanTransformer3DModel(**WAN), video(draw, size)


@case("WanVACETransformer3DModel")
def wan_vace(draw: Draw, size: int):
    module = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=6)
    return module, video(draw, size) | {"control_hidden_states": draw(1, 6, 2, 8 * size, 4)}


@case("ChronoEditTransformer3DModel")
def chrono_edit(draw: Draw, size: int):
    return diffusers.ChronoEditTransformer3DModel(**WAN), video(draw, size)


@case("SkyReelsV2Transformer3DModel")
def skyreels_v2(draw: Draw, size: int):
    return diffusers.SkyReelsV2Transformer3DModel(**WAN), video(draw, size)


@case("AnyFlowTransformer3DModel")
def any_flow(draw: Draw, size: int):
    given = video(draw, size)
    latents = given.pop("hidden_states").transpose(1, 2).contiguous()
    times = {"timestep": torch.full((1, 2), 500.0), "r_timestep": torch.full((1, 2), 400.0)}
    return diffusers.AnyFlowTransformer3DModel(**WAN), given | times | {"hidden_states": latents}


@case("HeliosTransformer3DModel")
def helios(draw: Draw, size: int):
    settings = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    module = diffusers.HeliosTransformer3DModel(**settings, rope_dim=(4, 6, 6))
    return module, video(draw, size) | {
        "indices_hidden_states": torch.arange(7, 9)[None],
        "indices_latents_history_short": torch.arange(5, 7)[None],
        "indices_latents_history_mid": torch.arange(3, 5)[None],
        "indices_latents_history_long": torch.arange(4)[None],
        "latents_history_short": draw(1, 4, 2, 8 * size, 4),
        "latents_history_mid": draw(1, 4, 2, 8 * size, 4),
        "latents_history_long": draw(1, 4, 4, 8 * size, 4),
    }


@case("WanAnimateTransformer3DModel")
def wan_animate(draw: Draw, size: int):
    settings = WAN | {"in_channels": 12, "latent_channels": 4}
    module = diffusers.WanAnimateTransformer3DModel(
        **settings,
        image_dim=16,
        added_kv_proj_dim=32,
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    )
    return module, video(draw, size, channels=12, frames=3) | {
        "encoder_hidden_states_image": draw(1, 5, 16),
        "pose_hidden_states": draw(1, 4, 2, 8 * size, 4),
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }


@case("AnyFlowFARTransformer3DModel")
def any_flow_far(draw: Draw, size: int):
    """The third chunk of a video, after two that are in its cache; the flags are what the pipeline gives."""
    module = diffusers.AnyFlowFARTransformer3DModel(**WAN, chunk_partition=(1, 1, 2), full_chunk_limit=2)
    given = video(draw, size)
    latents = given.pop("hidden_states").transpose(1, 2).contiguous()
    near, far = 8 * size, 2 * size  # tokens of a frame that is near, and of one that is far
    cache = [{"compressed_cache": draw(2, 1, 2, far, 16), "full_cache": draw(2, 1, 2, near, 16)} for _ in range(2)]
    return module, given | {
        "hidden_states": latents,
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.full((1, 2), 400.0),
        "chunk_partition": [1, 1, 2],
        "kv_cache": cache,
        "kv_cache_flag": {
            "is_cache_step": False,
            "num_cached_chunks": 2,
            "num_cached_full_tokens": near,
            "num_cached_compressed_tokens": far,
        },
    }


class GenerationPass(torch.nn.Module):
    """Wan-Animate 2 against the keys and values of its reference pass, which come as tensors."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, keys: list[torch.Tensor], values: list[torch.Tensor], **given: Any) -> list[torch.Tensor]:
        cache = WanAnimate2KVCache(len(keys))
        for layer, key, value in zip(cache.layer_caches, keys, values, strict=True):
            layer.store(key, value)
        return self.transformer(kv_cache=cache, kv_cache_mode="cached", return_dict=False, **given)[0]


@case(
    "WanAnimate2Transformer3DModel",
    scope="whole",
    fixed=("reference_grid_sizes",),
    note="The generation pass; blocks get a block mask, which is not a tensor, so they are no regions.",
)
def wan_animate2(draw: Draw, size: int):
    module = WanAnimate2Transformer3DModel(
        text_len=TEXT, in_dim=8, dim=32, ffn_dim=48, freq_dim=32, text_dim=24, out_dim=4, num_heads=2, num_layers=2
    )
    reference = 2 * 4 * size * 4
    return GenerationPass(module), {
        "keys": [draw(1, reference, 2, 16) for _ in range(2)],
        "values": [draw(1, reference, 2, 16) for _ in range(2)],
        "hidden_states": [draw(4, 3, 8 * size, 8)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [draw(TEXT, 24)],
        "condition_latents": [draw(4, 3, 8 * size, 8)],
        "seq_len": 3 * 4 * size * 4,
        "encoder_hidden_states_image": draw(1, 5, 1280),
        "reference_grid_sizes": torch.tensor([[2, 4 * size, 4]]),
        "origin_len": 5,
        "origin_area": [64 * size, 64],
    }
