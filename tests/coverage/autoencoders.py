"""Decoders of the autoencoders, compiled whole: what the end of a pipeline's call runs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_rfd4_proteina import RFD4ProteinaAutoencoder
from diffusers.models.autoencoders.vq_model import VQModel

from tests.coverage.registry import Draw, case
from tests.pipelines.parts import autoencoder_kl


class Decoder(torch.nn.Module):
    """An autoencoder whose `forward` is its `decode`."""

    def __init__(self, vae: torch.nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.vae, self.fixed = vae, fixed

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z, return_dict=False, **self.fixed)[0]


def decoder(name: str):
    """Register what builds an autoencoder and gives its latents' shape, of size 1; the height comes last but one."""

    def register(make):
        def made(draw: Draw, size: int):
            vae, shape, *fixed = make()
            return Decoder(vae, **(fixed[0] if fixed else {})), {"z": draw(*shape[:-2], shape[-2] * size, shape[-1])}

        return case(name, "autoencoder", "whole")(made)

    return register


KL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
UP_2D = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@decoder("AutoencoderKL")
def kl():
    return autoencoder_kl(4), (1, 4, 4, 4)


@decoder("AutoencoderKLFlux2")
def kl_flux2():
    return diffusers.AutoencoderKLFlux2(**KL, **UP_2D), (1, 4, 4, 4)


@decoder("AutoencoderKLTemporalDecoder")
def kl_temporal():
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    )
    return vae, (2, 4, 4, 4), {"num_frames": 2}


@decoder("AsymmetricAutoencoderKL")
def kl_asymmetric():
    vae = diffusers.AsymmetricAutoencoderKL(
        **UP_2D, down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4
    )
    return vae, (1, 4, 4, 4)


@decoder("AutoencoderTiny")
def tiny():
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return vae, (1, 4, 4, 4)


@decoder("AutoencoderDC")
def deep_compression():
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    return vae, (1, 8, 4, 4)


@decoder("VQModel")
def vq():
    vae = VQModel(**UP_2D, block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=16, latent_channels=4)
    return vae, (1, 4, 4, 4)


@decoder("AutoencoderKLHunyuanImage")
def kl_hunyuan_image():
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    return vae, (1, 4, 4, 4)


@decoder("AutoencoderKLHunyuanImageRefiner")
def kl_hunyuan_image_refiner():
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLWan")
def kl_wan():
    return diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1), (1, 16, 2, 4, 4)


@decoder("AutoencoderKLQwenImage")
def kl_qwen_image():
    return diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1), (1, 16, 1, 4, 4)


@decoder("AutoencoderKLQwenImage21")
def kl_qwen_image_21():
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    return vae, (1, 8, 1, 4, 4)


@decoder("AutoencoderKLCogVideoX")
def kl_cogvideox():
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_height=32, sample_width=48
    )
    return vae, (1, 16, 2, 4, 4)


@decoder("AutoencoderKLLTXVideo")
def kl_ltx():
    layers = (1, 1, 1, 1, 1)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=layers,
        decoder_layers_per_block=layers,
    )
    return vae, (1, 16, 2, 2, 2)


@decoder("AutoencoderKLLTX2Video")
def kl_ltx2():
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    )
    return vae, (1, 16, 2, 2, 2)


@decoder("AutoencoderKLHunyuanVideo")
def kl_hunyuan_video():
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLHunyuanVideo15")
def kl_hunyuan_video_15():
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLMochi")
def kl_mochi():
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1),
        temporal_expansions=(2,),
        spatial_expansions=(2,),
        add_attention_block=(False, True, True),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLCosmos")
def kl_cosmos():
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(8,),
        resolution=16,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLMagvit")
def kl_magvit():
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    return vae, (1, 4, 2, 4, 4)


@decoder("AutoencoderKLMiniMaxH3")
def kl_minimax_h3():
    vae = diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_downsample_factors=(2, 2, 1),
        temporal_downsample_factors=(1, 2, 1),
        norm_num_groups=4,
        decoder_num_layers=2,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        clip_length=5,
        token_drop=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    return vae, (1, 4, 3, 4, 4)


class Coordinates(torch.nn.Module):
    """The protein autoencoder's `decode`, which gives coordinates, residues and masks."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, **given: Any) -> tuple[torch.Tensor, ...]:
        return self.vae.decode(return_dict=False, **given)


@case("RFD4ProteinaAutoencoder", "autoencoder", "whole")
def rfd4_proteina(draw: Draw, size: int):
    kinds, residues, types = 7, 6 * size, 20
    vae = RFD4ProteinaAutoencoder(
        atom37_mask=[[atom < 5 for atom in range(37)] for _ in range(types)],
        allowed_residue_types=[[True] * types for _ in range(kinds)],
        latent_dim=4,
        n_residue_types=types,
        num_token_types=kinds,
        nlayers=2,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        token_type_emb_dim=8,
        decoder_feats_seq=("ca_coors_nm", "z_latent_seq", "token_type"),
    )
    return Coordinates(vae), {
        "z_latent": draw(1, residues, 4),
        "ca_coors_nm": draw(1, residues, 3),
        "padding_mask": torch.arange(residues)[None] < residues - 1,
        "token_type": torch.zeros(1, residues, dtype=torch.int64),
        "atom37_mask": torch.ones(1, residues, 37, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, residues, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, residues, dtype=torch.bool),
        },
    }
