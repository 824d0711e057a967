"""Families whose denoiser is a U-Net: Stable Diffusion 1.5 and XL."""

import diffusers

from tests.pipelines import parts, tokenizers
from tests.pipelines.registry import family

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@family("sd", height=64, width=64, guidance_scale=7.5)
def stable_diffusion():
    tokenizer = tokenizers.clip()
    return diffusers.StableDiffusionPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.18215),
        text_encoder=parts.clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=2,  # the number of heads: the name is historical
            cross_attention_dim=parts.DIM,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, **NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@family("sdxl", height=64, width=64, guidance_scale=5.0)
def stable_diffusion_xl():
    tokenizer, tokenizer_2 = tokenizers.clip(), tokenizers.clip(pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.13025),
        text_encoder=parts.clip_encoder(tokenizer),
        text_encoder_2=parts.clip_encoder(tokenizer_2, projection=True, act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=(1, 2),
            cross_attention_dim=2 * parts.DIM,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=parts.DIM + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **NOISE_SCHEDULE),
        add_watermarker=False,
    )
