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
        in_channels=8,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    return module, {
        "hidden_states": draw(1, 8, 12 * size),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 12 * size, 16),
    }


@case("StableAudio3DiTModel")
def stable_audio3(draw: Draw, size: int):
    module = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=24,
        global_cond_dim=24,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        num_memory_tokens=4,
    )
    return module, {
        "hidden_states": draw(1, 8, 12 * size),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 6, 24),
        "global_hidden_states": draw(1, 24),
        "encoder_attention_mask": (torch.arange(6) < 4).long()[None],
        "local_add_cond": draw(1, 9, 12 * size),
    }


RESIDUES = 6
#: Few of the features that proteins can have: those that need nothing but what `forward` is given.
FEATURES = {
    "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
    "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
    "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
    "feats_pair_cond": ("time_emb_bb_ca",),
}


@case("RFD4ProteinaTransformer")
def rfd4_proteina(draw: Draw, size: int):
    module = diffusers.RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        latent_dim=4,
        token_type_emb_dim=8,
        t_emb_dim=16,
        xt_pair_dist_dim=6,
        tri_mult_c=8,
        **FEATURES,
    )
    residues = RESIDUES * size
    return module, {
        "bb_ca": draw(1, residues, 3),
        "local_latents": draw(1, residues, 4),
        "bb_ca_time": torch.tensor([0.5]),
        "local_latents_time": torch.tensor([0.4]),
        "padding_mask": torch.arange(residues)[None] < residues - 1,
        "token_type": torch.zeros(1, residues, dtype=torch.int64),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, residues, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, residues, dtype=torch.bool),
        },
    }
