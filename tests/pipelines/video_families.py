"""Video families: LTX, Wan 2.1 and CogVideoX, five or nine frames long."""

import diffusers

from tests.pipelines import parts, tokenizers
from tests.pipelines.registry import family


@family("ltx", video=True, height=64, width=96, num_frames=9, guidance_scale=3.0, max_sequence_length=32)
def ltx():
    tokenizer = tokenizers.t5()
    layers = (1, 1, 1, 1, 1)
    return diffusers.LTXPipeline(
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=layers,
            decoder_layers_per_block=layers,
        ),
        text_encoder=parts.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=parts.DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
    )


@family("wan", video=True, height=32, width=48, num_frames=5, guidance_scale=5.0, max_sequence_length=32)
def wan():
    tokenizer = tokenizers.t5()
    return diffusers.WanPipeline(
        vae=diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1),
        text_encoder=parts.t5_encoder(tokenizer, multilingual=True),
        tokenizer=tokenizer,
        transformer=diffusers.WanTransformer3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=parts.DIM,
            freq_dim=32,
            ffn_dim=64,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@family("cogvideox", video=True, height=32, width=48, num_frames=9, guidance_scale=6.0, max_sequence_length=32)
def cogvideox():
    tokenizer = tokenizers.t5()
    return diffusers.CogVideoXPipeline(
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_height=32, sample_width=48
        ),
        text_encoder=parts.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            time_embed_dim=16,
            text_embed_dim=parts.DIM,
            sample_height=4,
            sample_width=6,
            sample_frames=9,
            max_text_seq_length=32,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    )
