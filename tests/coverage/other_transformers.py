"""Transformers that give neither images nor videos: sound, and the shapes of proteins."""

from __future__ import annotations

import diffusers
import torch

from tests.coverage.registry import Draw, case


@case("LongCatAudioDiTTransformer")
def longcat_audio(draw: Draw, size: int):
    module = diffusers.LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=24, latent_dim=8)
    return module, {
        "hidden_states": draw(1, 12 * size, 8),
        "encoder_hidden_states": draw(1, 8, 24),
        "encoder_attention_mask": torch.arange(8)[None] < 5,
        "timestep": torch.tensor([0.5]),
        "attention_mask": torch.ones(1, 12 * size, dtype=torch.bool),
        "latent_cond": draw(1, 12 * size, 8),
    }


@case("MiniMaxMusic3Transformer1DModel")
def minimax_music3(draw: Draw, size: int):
    module = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=48,
        rotary_dim=8, fourier_embedding_dim=16,
    )
    return module, {
        "hidden_states": draw(1, 8, 12 * size),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 12 * size, 16),
    }


@case("StableAudio3DiTModel")
def stable_audio3(draw: Draw, size: int):
    module = diffusers.StableAudio3DiTModel(
        io_channels=8, embed_dim=32, depth=2, num_heads=2, cond_token_dim=24, global_cond_dim=24, local_add_cond_dim=9,
        timestep_features_dim=16, num_memory_tokens=4,
    )
    return module, {
        "hidden_states": draw(1, 8, 12 * size),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 6, 24),
        "global_hidden_states": draw(1, 24),
        "encoder_attention_mask": (torch.arange(6) < 4).long()[None],
        "local_add_cond": draw(1, 9, 12 * size),
    }
