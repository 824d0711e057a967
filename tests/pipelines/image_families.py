"""Image families whose denoiser is a transformer."""

import diffusers

from tests.pipelines import parts, tokenizers
from tests.pipelines.registry import family


@family("sd3", height=64, width=64, guidance_scale=7.0, max_sequence_length=32)
def stable_diffusion_3():
    tokenizer, tokenizer_2, tokenizer_3 = tokenizers.clip(), tokenizers.clip(pad_token="!"), tokenizers.t5()
    dim = 2 * parts.DIM  # both CLIP embeddings side by side are padded to T5's width, so that may not be less
    return diffusers.StableDiffusion3Pipeline(
        vae=parts.autoencoder_kl(16, quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=parts.clip_encoder(tokenizer, projection=True),
        text_encoder_2=parts.clip_encoder(tokenizer_2, projection=True, act="gelu"),
        text_encoder_3=parts.t5_encoder(tokenizer_3, dim=dim),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            pos_embed_max_size=16,
            num_layers=3,  # the last block drops its text stream: two blocks are alike
            num_attention_heads=2,
            attention_head_dim=16,
            caption_projection_dim=32,
            joint_attention_dim=dim,
            pooled_projection_dim=2 * parts.DIM,
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@family(
    "pixart_sigma",
    height=64,
    width=64,
    guidance_scale=4.5,
    max_sequence_length=32,
    clean_caption=False,  # needs Beautiful Soup
    use_resolution_binning=False,  # it knows no size near 64 x 64
)
def pixart_sigma():
    tokenizer = tokenizers.t5()
    return diffusers.PixArtSigmaPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.13025),
        text_encoder=parts.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=parts.DIM,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2),
    )


@family("flux", height=64, width=64, guidance_scale=3.5, max_sequence_length=32)
def flux():
    tokenizer, tokenizer_2 = tokenizers.clip(), tokenizers.t5()
    return diffusers.FluxPipeline(
        vae=parts.flux_autoencoder(),
        text_encoder=parts.clip_encoder(tokenizer),
        text_encoder_2=parts.t5_encoder(tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=parts.DIM,
            pooled_projection_dim=parts.DIM,
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
