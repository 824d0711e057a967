"""Transformers of one kind of block that draw images."""

from __future__ import annotations

import diffusers
import torch

from tests.coverage.registry import Draw, case, grid

TEXT = 8  # tokens of the prompt
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding


@case("QwenImageTransformer2DModel", fixed=("encoder_hidden_states_mask",))
def qwen_image(draw: Draw, size: int):
    module = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, **HEADS, joint_attention_dim=32, axes_dims_rope=AXES
    )
    return module, {
        "hidden_states": draw(1, 16 * size, 16),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4 * size, 4)]],
    }


@case("QwenImage21Transformer2DModel", fixed=("img_mask",))
def qwen_image_21(draw: Draw, size: int):
    module = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, **HEADS, context_in_dim=32, axes_dims_rope=AXES
    )
    slots = 4 * size  # one slot of the prompt holds four tokens of the image
    return module, {
        "hidden_states": draw(1, 16 * size, 16),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4 * size, 4)]],
        "img_mask": torch.arange(TEXT + slots)[None] >= TEXT,
    }


@case("ZImageTransformer2DModel")
def z_image(draw: Draw, size: int):
    module = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=list(AXES),
        axes_lens=[256, 64, 64],
    )
    return module, {
        "x": [draw(4, 1, 8 * size, 16)],
        "t": torch.tensor([0.5]),
        "cap_feats": [draw(TEXT, 24)],
        "return_dict": False,
    }


@case("ErnieImageTransformer2DModel")
def ernie_image(draw: Draw, size: int):
    module = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=8,
        out_channels=8,
        text_in_dim=24,
        rope_axes_dim=AXES,
    )
    return module, {
        "hidden_states": draw(1, 8, 4 * size, 4),
        "timestep": torch.tensor([500.0]),
        "text_bth": draw(1, TEXT, 24),
        "text_lens": torch.tensor([5]),
    }


@case("GlmImageTransformer2DModel", fixed=("prior_token_drop",))
def glm_image(draw: Draw, size: int):
    module = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    return module, {
        "hidden_states": draw(1, 4, 8 * size, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "prior_token_id": draw.ids(32, 1, 16 * size),
        "prior_token_drop": torch.zeros(1, 16 * size, dtype=torch.bool),
        "timestep": torch.tensor([500.0]),
        "target_size": torch.tensor([[64.0 * size, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


@case("Ideogram4Transformer2DModel")
def ideogram4(draw: Draw, size: int):
    module = diffusers.Ideogram4Transformer2DModel(
        in_channels=8,
        num_layers=2,
        **HEADS,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=24,
        mrope_section=(4, 2, 2),
    )
    tokens = TEXT + 16 * size
    image = torch.arange(tokens) >= TEXT
    positions = torch.cat([grid(TEXT).flip(1), grid(4 * size, 4) + TEXT])
    return module, {
        "hidden_states": draw(1, tokens, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, tokens, 24),
        "position_ids": positions.long()[None],
        "segment_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "indicator": torch.where(image, 2, 3)[None],
    }


@case("Krea2Transformer2DModel")
def krea2(draw: Draw, size: int):
    module = diffusers.Krea2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        **HEADS,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=AXES,
    )
    return module, {
        "hidden_states": draw(1, 16 * size, 8),
        "encoder_hidden_states": draw(1, TEXT, 3, 24),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4 * size, 4)]),
        "encoder_attention_mask": torch.arange(TEXT)[None] < 5,
    }


@case("NucleusMoEImageTransformer2DModel", fixed=("encoder_hidden_states_mask",))
def nucleus_moe_image(draw: Draw, size: int):
    module = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        **HEADS,
        joint_attention_dim=24,
        axes_dims_rope=AXES,
        num_experts=4,
        moe_intermediate_dim=24,
        capacity_factors=2.0,
    )
    return module, {
        "hidden_states": draw(1, 16 * size, 16),
        "img_shapes": [(1, 4 * size, 4)],
        "encoder_hidden_states": draw(1, TEXT, 24),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
    }


@case("BriaFibo2Transformer2DModel")
def bria_fibo2(draw: Draw, size: int):
    module = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=AXES,
        axes_lens=(64, 64, 64),
    )
    return module, {
        "hidden_states": draw(1, 4, 8 * size, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 2, TEXT, 24),
    }


@case("JoyImageEditTransformer3DModel")
def joy_image_edit(draw: Draw, size: int):
    module = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=2, rope_dim_list=list(AXES)
    )
    return module, {
        "hidden_states": draw(1, 4, 1, 8 * size, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 24),
    }


@case("JoyImageEditPlusTransformer3DModel")
def joy_image_edit_plus(draw: Draw, size: int):
    module = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=2, rope_dim_list=list(AXES)
    )
    return module, {
        "hidden_states": draw(1, 32 * size, 4, 1, 2, 2),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "shape_list": [[(1, 4 * size, 4), (1, 4 * size, 4)]],
    }


@case(
    "Cosmos3OmniTransformer",
    fixed=(
        "text_indexes",
        "position_ids",
        "vision_sequence_indexes",
        "vision_mse_loss_indexes",
        "vision_noisy_frame_indexes",
    ),
)
def cosmos3(draw: Draw, size: int):
    module = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        rope_axes_dim=(4, 2, 2),
        vocab_size=64,
    )
    vision = 2 * 4 * size * 4
    positions = torch.cat([grid(TEXT).flip(1), grid(2, 4 * size, 4) + TEXT]).long()
    return module, {
        "input_ids": draw.ids(64, TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": positions.T.contiguous(),
        "und_len": TEXT,
        "sequence_length": TEXT + vision,
        "vision_tokens": [draw(1, 4, 2, 8 * size, 8)],
        "vision_token_shapes": [(2, 4 * size, 4)],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + vision),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + vision),
        "vision_timesteps": torch.full((vision,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }
