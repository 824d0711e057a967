"""Transformers for video that are neither FLUX's nor Wan's kin."""

from __future__ import annotations

import diffusers
import torch

from tests.coverage.registry import Draw, case

TEXT = 8  # tokens of the prompt
AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding


@case("LTXVideoTransformer3DModel")
def ltx(draw: Draw, size: int):
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )
    return module, {
        "hidden_states": draw(1, 32 * size, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "num_frames": 2,
        "height": 4 * size,
        "width": 4,
    }


LTX2 = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 24,
}


@case("LTX2VideoTransformer3DModel")
def ltx2(draw: Draw, size: int):
    return diffusers.LTX2VideoTransformer3DModel(**LTX2), {
        "hidden_states": draw(1, 32 * size, 8),
        "audio_hidden_states": draw(1, 6, 6),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "audio_encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "audio_encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "num_frames": 2,
        "height": 4 * size,
        "width": 4,
        "audio_num_frames": 6,
    }


@case("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner(draw: Draw, size: int):
    module = diffusers.SanaWMLTX2RefinerTransformer3DModel(**LTX2)
    rotary = module.build_rotary_emb_for_absolute_positions(1, [0, 1], 4 * size, 4, torch.device("cpu"), 24.0)
    return module, {
        "hidden_states": draw(1, 32 * size, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": torch.full((1, 32 * size), 500.0),
        "video_rotary_emb": tuple(rotary),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
    }


@case("SanaWMTransformer3DModel")
def sana_wm(draw: Draw, size: int):
    module = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        caption_channels=24,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=4,
        image_size=64,
    )
    cameras = torch.cat([torch.eye(4).reshape(16), torch.tensor([4.0, 4.0, 2.0, 2.0])]).repeat(1, 3, 1)
    cameras[0, :, 3] = torch.arange(3) / 10  # the camera moves sideways
    return module, {
        "hidden_states": draw(1, 4, 3, 4 * size, 4),
        "timestep": torch.full((1, 1, 3), 500.0),
        "encoder_hidden_states": draw(1, 1, TEXT, 24),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "camera_conditions": cameras,
        "chunk_plucker": draw(1, 6, 3, 4 * size, 4),
    }


@case(
    "Kandinsky5Transformer3DModel",
    fixed=("visual_rope_pos", "text_rope_pos"),
    note="casts queries and keys to bfloat16, so that up to 1e-2 is rounding",
    tolerance=1e-2,
)
def kandinsky5(draw: Draw, size: int):
    module = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=AXES,
    )
    return module, {
        "hidden_states": draw(1, 2, 8 * size, 8, 4),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": draw(1, 20),
        "visual_rope_pos": [torch.arange(2), torch.arange(4 * size), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


@case("Kandinsky6Transformer3DModel")
def kandinsky6(draw: Draw, size: int):
    module = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=AXES,
        visual_cond=False,
        in_audio_dim=6,
        out_audio_dim=6,
    )
    return module, {
        "hidden_states": draw(1, 2, 8 * size, 8, 4),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "pooled_projections": draw(1, 20),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": draw(1, 6, 6),
    }


@case("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr(draw: Draw, size: int):
    module = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=64,
        ff_dim=48,
        num_visual_blocks=2,
        axes_dims=(16, 24, 24),
    )
    return module, {"hidden_states": draw(1, 2, 16 * size, 16, 9), "timestep": torch.tensor([500.0])}


@case(
    "MiniMaxH3Transformer3DModel",
    fixed=("timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices", "text_indices"),
)
def minimax_h3(draw: Draw, size: int):
    module = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=6,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    counts = {"text": TEXT, "video": 32 * size, "audio": 4}
    tags = torch.cat([torch.full((count,), tag) for tag, count in enumerate(counts.values())])
    return module, {
        "hidden_states": draw(1, 32 * size, 16),
        "audio_hidden_states": draw(1, 4, 6),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros_like(tags),
        "token_tags": tags,
        "position_ids": torch.arange(len(tags), dtype=torch.float32)[:, None].repeat(1, 3),
        "video_indices": (tags == 1).nonzero()[:, 0],
        "audio_indices": (tags == 2).nonzero()[:, 0],
        "text_indices": (tags == 0).nonzero()[:, 0],
    }
