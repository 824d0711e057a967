"""Video transformers of Wan's kind: one stream, cross-attention to the prompt, and what was made of it."""

from __future__ import annotations

import diffusers
import torch

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
        **settings, image_dim=16, added_kv_proj_dim=32, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    )
    return module, video(draw, size, channels=12, frames=3) | {
        "encoder_hidden_states_image": draw(1, 5, 16),
        "pose_hidden_states": draw(1, 4, 2, 8 * size, 4),
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }
