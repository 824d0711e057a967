"""Further pipelines from text to a video."""

from __future__ import annotations

import diffusers
import transformers

from tests.coverage.calls.registry import call
from tests.pipelines import parts, tokenizers
from tests.pipelines.unet_families import NOISE_SCHEDULE

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding


@call("latte", video=True, height=64, width=64, video_length=3, clean_caption=False)
def latte():
    tokenizer = tokenizers.t5(max_length=120)
    return diffusers.LattePipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        vae=parts.autoencoder_kl(4),
        transformer=diffusers.LatteTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=parts.DIM,
            video_length=3,
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


@call("mochi", video=True, height=32, width=48, num_frames=7, max_sequence_length=32)
def mochi():
    tokenizer = tokenizers.t5()
    return diffusers.MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        transformer=diffusers.MochiTransformer3DModel(
            num_layers=2,
            **HEADS,
            pooled_projection_dim=16,
            text_embed_dim=parts.DIM,
            time_embed_dim=16,
            max_sequence_length=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


@call("hunyuan_video", video=True, height=32, width=48, num_frames=5, max_sequence_length=64)
def hunyuan_video():
    tokenizer, tokenizer_2 = tokenizers.qwen(), tokenizers.clip()
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.LlamaModel(transformers.LlamaConfig(**parts.decoder_config(tokenizer, layers=4))),
        tokenizer_2=tokenizer_2,
        text_encoder_2=parts.clip_encoder(tokenizer_2),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            **HEADS,
            num_refiner_layers=1,
            text_embed_dim=parts.DIM,
            pooled_projection_dim=parts.DIM,
            rope_axes_dim=AXES,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


@call(
    "sana_video",
    video=True,
    height=32,
    width=64,
    frames=5,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=["Describe the image of the user.", "User Prompt: "],
)
def sana_video():
    tokenizer = tokenizers.gemma()
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.gemma2_encoder(tokenizer),
        vae=diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1),
        transformer=diffusers.SanaVideoTransformer3DModel(
            num_layers=2,
            **HEADS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=parts.DIM,
            sample_size=8,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@call("text_to_video_sd", video=True, height=64, width=64, num_frames=3)
def text_to_video_sd():
    tokenizer = tokenizers.clip()
    return diffusers.TextToVideoSDPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.clip_encoder(tokenizer),
        vae=parts.autoencoder_kl(4),
        unet=diffusers.UNet3DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=8,
            cross_attention_dim=parts.DIM,
        ),
        scheduler=diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False),
    )


@call("kandinsky5_video", video=True, height=32, width=48, num_frames=5, max_sequence_length=256)
def kandinsky5_video():
    tokenizer, tokenizer_2 = tokenizers.qwen(), tokenizers.clip()
    return diffusers.Kandinsky5T2VPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.qwen25_vl_encoder(tokenizer),
        tokenizer_2=tokenizer_2,
        text_encoder_2=parts.clip_encoder(tokenizer_2),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=parts.DIM,
            in_text_dim2=parts.DIM,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=AXES,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
