"""Tiny pipelines that differ in what their calls take and give: labels, pictures alone, embeddings, sound."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.pipelines import parts, tokenizers, vision
from tests.pipelines.registry import FAMILIES, Family, family
from tests.pipelines.unet_families import NOISE_SCHEDULE

INPUTS: dict[str, Family] = {}


def image_encoder(size: int) -> Any:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=parts.DIM,
            projection_dim=parts.DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=size // 4,
        )
    )


def image_processor(size: int) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@family("ddim", table=INPUTS)
def ddim():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False))


@family("dit", table=INPUTS, guidance_scale=4.0)
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )
    vae = parts.autoencoder_kl(4, scaling_factor=0.18215)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))


@family("image_variation", table=INPUTS, height=64, width=64, guidance_scale=7.5, images={"image": {}})
def image_variation():
    return diffusers.StableDiffusionImageVariationPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.18215),
        image_encoder=image_encoder(32),
        unet=FAMILIES["sd"].build().unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=image_processor(32),
        requires_safety_checker=False,
    )


@family("svd", table=INPUTS, video=True, height=64, width=64, num_frames=2, decode_chunk_size=2, images={"image": {}})
def stable_video_diffusion():
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=parts.DIM,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.02,
        sigma_max=7.0,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=image_encoder(224),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=image_processor(224),
    )


@family("kandinsky_prior", table=INPUTS, guidance_scale=4.0)
def kandinsky_prior():
    tokenizer = tokenizers.clip()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=parts.DIM, num_embeddings=77
    )
    return diffusers.KandinskyPriorPipeline(
        prior=prior,
        image_encoder=image_encoder(32),
        text_encoder=parts.clip_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        image_processor=image_processor(32),
    )


@family("easy_animate", table=INPUTS, video=True, height=32, width=32, num_frames=5)
def easy_animate():
    tokenizer = tokenizers.qwen(max_length=256)
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=parts.DIM,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        patch_size=2,
        time_position_encoding_type="3d_rope",
        enable_text_attention_mask=True,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
        down_block_types=("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3),
        up_block_types=("SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3),
    )
    return diffusers.EasyAnimatePipeline(
        vae=vae,
        text_encoder=transformers.Qwen2VLForConditionalGeneration(_qwen2_vl(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _qwen2_vl(tokenizer: Any) -> Any:
    text = parts.decoder_config(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": parts.DIM, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=tower)


@family("flux2_processor", table=INPUTS, **FAMILIES["flux2"].call)
def flux2_with_a_processor():
    tokenizer = vision.qwen_vl_tokenizer()
    processor = vision.qwen_vl_processor(tokenizer)  # as PixtralProcessor, which needs torchvision
    processor.chat_template = tokenizer.chat_template
    given = FAMILIES["flux2"].build().components
    return diffusers.Flux2Pipeline(
        **{**given, "tokenizer": processor, "text_encoder": parts.mistral3_encoder(tokenizer)}
    )


@family("stable_audio", table=INPUTS, audio_end_in_s=0.5, guidance_scale=4.0)
def stable_audio():
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    tokenizer = tokenizers.t5(max_length=16)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=64,
    )
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    return diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=parts.t5_encoder(tokenizer),
        projection_model=StableAudioProjectionModel(parts.DIM, 8, 0, 32),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
