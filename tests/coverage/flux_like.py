"""Transformers of two kinds of block, with text and image in two streams and then in one: FLUX and what follows it."""

from __future__ import annotations

import diffusers
import torch

from tests.coverage.registry import Draw, case, grid

TEXT = 8  # tokens of the prompt
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LAYERS = {"num_layers": 2, "num_single_layers": 2}
AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding


def tokens(draw: Draw, size: int, channels: int, width: int, axes: int = 3) -> dict:
    """An image of 4 × 4 tokens, or of 8 × 4, and a prompt."""
    return {
        "hidden_states": draw(1, 16 * size, channels),
        "encoder_hidden_states": draw(1, TEXT, width),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid(4 * size, 4, axes=axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


@case("FluxTransformer2DModel")
def flux(draw: Draw, size: int):
    module = diffusers.FluxTransformer2DModel(
        in_channels=16,
        **LAYERS,
        **HEADS,
        axes_dims_rope=AXES,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
    )
    return module, tokens(draw, size, 16, 32) | {"pooled_projections": draw(1, 24), "guidance": torch.tensor([3.5])}


@case("Flux2Transformer2DModel")
def flux2(draw: Draw, size: int):
    module = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        **LAYERS,
        **HEADS,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=24,
        timestep_guidance_channels=32,
    )
    return module, tokens(draw, size, 16, 24, axes=4) | {"guidance": torch.tensor([3.5])}


@case("Flux3Transformer2DModel")
def flux3(draw: Draw, size: int):
    module = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        **LAYERS,
        **HEADS,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=24,
        timestep_channels=32,
    )
    return module, tokens(draw, size, 16, 24, axes=4)


@case("ChromaTransformer2DModel")
def chroma(draw: Draw, size: int):
    module = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        **LAYERS,
        **HEADS,
        axes_dims_rope=AXES,
        joint_attention_dim=32,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    mask = torch.ones(1, TEXT + 16 * size)
    mask[:, 5:TEXT] = 0
    return module, tokens(draw, size, 16, 32) | {"attention_mask": mask}


@case("BriaFiboTransformer2DModel")
def bria_fibo(draw: Draw, size: int):
    module = diffusers.BriaFiboTransformer2DModel(
        in_channels=16, **LAYERS, **HEADS, axes_dims_rope=list(AXES), joint_attention_dim=32, text_encoder_dim=16
    )
    layers = [draw(1, TEXT, 16) for _ in range(4)]
    return module, tokens(draw, size, 16, 32) | {"text_encoder_layers": layers}


@case("LongCatImageTransformer2DModel")
def longcat_image(draw: Draw, size: int):
    module = diffusers.LongCatImageTransformer2DModel(
        in_channels=16, **LAYERS, **HEADS, axes_dims_rope=list(AXES), joint_attention_dim=32, pooled_projection_dim=32
    )
    return module, tokens(draw, size, 16, 32)


@case("OvisImageTransformer2DModel")
def ovis_image(draw: Draw, size: int):
    module = diffusers.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, **LAYERS, **HEADS, axes_dims_rope=AXES, joint_attention_dim=32
    )
    return module, tokens(draw, size, 16, 32)


@case("HunyuanImageTransformer2DModel")
def hunyuan_image(draw: Draw, size: int):
    module = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, **LAYERS, **HEADS, num_refiner_layers=1, text_embed_dim=32, rope_axes_dim=(8, 8)
    )
    return module, {
        "hidden_states": draw(1, 8, 4 * size, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
    }


@case("HunyuanVideoTransformer3DModel")
def hunyuan_video(draw: Draw, size: int):
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **LAYERS,
        **HEADS,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=AXES,
    )
    return module, {
        "hidden_states": draw(1, 4, 2, 4 * size, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "pooled_projections": draw(1, 24),
        "guidance": torch.tensor([6000.0]),
    }


@case("HunyuanVideo15Transformer3DModel", fixed=("image_embeds", "encoder_attention_mask", "encoder_attention_mask_2"))
def hunyuan_video_15(draw: Draw, size: int):
    module = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_layers=2,
        **HEADS,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=24,
        image_embed_dim=16,
        rope_axes_dim=AXES,
    )
    return module, {
        "hidden_states": draw(1, 9, 2, 4 * size, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
        "encoder_hidden_states_2": draw(1, 6, 24),
        "encoder_attention_mask_2": (torch.arange(6) < 4).long()[None],
        "image_embeds": torch.zeros(1, 4, 16),
    }


@case("MotifVideoTransformer3DModel")
def motif_video(draw: Draw, size: int):
    module = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, **LAYERS, **HEADS, text_embed_dim=32, rope_axes_dim=AXES
    )
    return module, {
        "hidden_states": draw(1, 9, 2, 4 * size, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 32),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long()[None],
    }
