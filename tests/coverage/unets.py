"""U-Nets. Those without repeated blocks are compiled whole."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

from tests.coverage.registry import Draw, case

LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TEXT = 8  # tokens of the prompt


def image(draw: Draw, size: int, width: int = 24) -> dict:
    """Latents of 8 × 8 and a prompt."""
    return {
        "sample": draw(1, 4, 8 * size, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TEXT, width),
    }


@case("UNet2DConditionModel", "unet")
def unet_2d_condition(draw: Draw, size: int):
    module = diffusers.UNet2DConditionModel(
        sample_size=8,
        **LEVELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    added = {"text_embeds": draw(1, 20), "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])}
    return module, image(draw, size) | {"added_cond_kwargs": added}


@case("DreamLiteUNetModel", "unet")
def dream_lite(draw: Draw, size: int):
    module = diffusers.DreamLiteUNetModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        attention_head_dim=(2, 2),
        cross_attention_dim=24,
        ff_mult=2,
    )
    return module, image(draw, size)


@case("UNet3DConditionModel", "unet", "whole")
def unet_3d_condition(draw: Draw, size: int):
    module = diffusers.UNet3DConditionModel(
        **LEVELS,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
        cross_attention_dim=24,
    )
    return module, image(draw, size) | {"sample": draw(1, 4, 2, 8 * size, 8)}


@case("UNetMotionModel", "unet", "whole")
def unet_motion(draw: Draw, size: int):
    module = diffusers.UNetMotionModel(
        **LEVELS,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        cross_attention_dim=24,
    )
    given = image(draw, size)
    prompts = given["encoder_hidden_states"].repeat_interleave(2, dim=0)  # one for each frame
    return module, given | {"sample": draw(1, 4, 2, 8 * size, 8), "encoder_hidden_states": prompts}


@case("UNetSpatioTemporalConditionModel", "unet", "whole")
def unet_spatio_temporal(draw: Draw, size: int):
    module = diffusers.UNetSpatioTemporalConditionModel(
        in_channels=4,
        block_out_channels=(32, 64),  # its norms have 32 groups
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_attention_heads=(2, 2),
        cross_attention_dim=24,
    )
    given = image(draw, size)
    times = {"added_time_ids": torch.tensor([[6.0, 127.0, 0.02]])}
    return module, given | times | {"sample": draw(1, 2, 4, 8 * size, 8), "encoder_hidden_states": draw(1, 1, 24)}


@case("I2VGenXLUNet", "unet", "whole")
def i2vgen_xl(draw: Draw, size: int):
    module = I2VGenXLUNet(
        **LEVELS,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=24,
    )
    return module, image(draw, size) | {
        "sample": draw(1, 4, 2, 8 * size, 8),
        "fps": torch.tensor([8]),
        "image_latents": draw(1, 4, 2, 8 * size, 8),
        "image_embeddings": draw(1, 24),
    }


@case("UNet2DModel", "unet", "whole")
def unet_2d(draw: Draw, size: int):
    module = diffusers.UNet2DModel(
        **LEVELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return module, {"sample": draw(1, 3, 8 * size, 8), "timestep": torch.tensor([500])}


@case("UNet1DModel", "unet", "whole")
def unet_1d(draw: Draw, size: int):
    module = diffusers.UNet1DModel(
        sample_size=64,
        block_out_channels=(32, 64),  # heads of 32
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
        extra_in_channels=64,
    )
    return module, {"sample": draw(1, 2, 64 * size), "timestep": torch.tensor([500])}


@case("Kandinsky3UNet", "unet", "whole")
def kandinsky3(draw: Draw, size: int):
    module = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=8,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=16,
        encoder_hid_dim=24,
    )
    mask = (torch.arange(TEXT) < 5).float()[None]
    return module, image(draw, size) | {"encoder_attention_mask": mask}


@case("StableCascadeUNet", "unet", "whole")
def stable_cascade(draw: Draw, size: int):
    module = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=24,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=24,
        clip_text_pooled_in_channels=20,
        clip_image_in_channels=16,
        switch_level=(False,),
    )
    return module, {
        "sample": draw(1, 4, 8 * size, 8),
        "timestep_ratio": torch.tensor([0.5]),
        "clip_text_pooled": draw(1, 1, 20),
        "clip_text": draw(1, TEXT, 24),
        "clip_img": draw(1, 1, 16),
    }


@case("UVit2DModel", "unet", "whole")
def uvit_2d(draw: Draw, size: int):
    module = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=24,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=40,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=8,
    )
    return module, {
        "input_ids": draw.ids(40, 1, 8 * size, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "pooled_text_emb": draw(1, 24),
        "micro_conds": torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]),
    }
