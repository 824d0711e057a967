"""Video pipelines with text encoders, autoencoders or ways of their own; some make sound, too."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.coverage.calls.derived import assembled, derived, model
from tests.coverage.calls.image_inputs import IMAGE
from tests.coverage.calls.newer_images import byt5, flow, wan_vae
from tests.coverage.calls.parts import VISION, image_encoder, image_processor, siglip_encoder, siglip_processor
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import changed
from tests.pipelines import parts, tokenizers, vision
from tests.pipelines.parts import DIM
from tests.pipelines.unet_families import NOISE_SCHEDULE

CLIP_SIZE = {"height": 32, "width": 48, "num_frames": 5}
VIDEO = [{}] * 5
FRAMES = ("num_frames",)


def easy_animate(kind: str, channels: int = 4) -> Any:
    tokenizer = tokenizers.qwen(max_length=256)
    settings = parts.decoder_config(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}
    }
    config = transformers.Qwen2VLConfig(
        text_config=settings,
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": DIM, "mlp_ratio": 2},
    )
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=DIM,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        patch_size=2,
        time_position_encoding_type="3d_rope",
        resize_inpaint_mask_directly=True,
        enable_text_attention_mask=True,
        add_noise_in_inpaint_model=True,
    )
    return assembled(
        kind,
        {
            "vae": model("AutoencoderKLMagvit"),
            "text_encoder": transformers.Qwen2VLForConditionalGeneration(config),
            "tokenizer": tokenizer,
            "transformer": transformer,
            "scheduler": flow(),
        },
    )


EASY = {"height": 64, "width": 64, "num_frames": 5, "negative_prompt": "old"}


@call("easy_animate", video=True, **EASY)
def easy_animate_pipeline():
    return easy_animate("EasyAnimatePipeline")


def hunyuan15(kind: str, channels: int, **more: Any) -> Any:
    tokenizer = tokenizers.qwen(max_length=1200)
    vae = model(
        "AutoencoderKLHunyuanVideo15",
        block_out_channels=(8, 16, 16, 16, 16),
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    transformer = model(
        "HunyuanVideo15Transformer3DModel",
        in_channels=channels,
        text_embed_dim=DIM,
        text_embed_2_dim=DIM,
        image_embed_dim=DIM,
    )
    given = {
        "tokenizer": tokenizer,
        "text_encoder": parts.qwen25_vl_encoder(tokenizer).model.language_model,
        "vae": vae,
    }
    given |= byt5() | {"transformer": transformer, "scheduler": flow()}
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.5)
    return assembled(kind, given | {"guider": guider} | more)


@call("hunyuan15", video=True, height=64, width=64, num_frames=5)
def hunyuan15_text():
    return hunyuan15("HunyuanVideo15Pipeline", 9)


@call("hunyuan15_i2v", video=True, images=IMAGE, num_frames=5)
def hunyuan15_image():
    seen = {"image_encoder": siglip_encoder(), "feature_extractor": siglip_processor()}
    return hunyuan15("HunyuanVideo15ImageToVideoPipeline", 9, **seen)


def framepack(given: dict[str, Any]) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=DIM,
        pooled_projection_dim=DIM,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=DIM,
        has_clean_x_embedder=True,
    )
    return {
        "transformer": transformer,
        "image_encoder": siglip_encoder(),
        "feature_extractor": siglip_processor(),
    }


derived(
    "hunyuan_framepack",
    "HunyuanVideoFramepackPipeline",
    "hunyuan_video",
    framepack,
    images=IMAGE,
    video=True,
    latent_window_size=2,
)


def llava(given: dict[str, Any]) -> dict[str, Any]:
    tokenizer = tokenizers.llama3()
    text = parts.decoder_config(tokenizer, layers=4) | {"model_type": "llama"}
    tower = VISION | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": DIM}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=tower,
        pad_token_id=tokenizer.pad_token_id,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.LlavaForConditionalGeneration(config),
        "image_processor": image_processor(),
        "transformer": changed(given["transformer"], in_channels=9, image_condition_type="latent_concat"),
    }


TEMPLATE = {
    "template": "<|start_header_id|>system<|end_header_id|> <image> Describe<|start_header_id|>user<|end_header_id|> {}"
    "<|start_header_id|>assistant<|end_header_id|> ",
    "crop_start": 12,
    "image_emb_start": 5,
    "image_emb_end": 9,
    "image_emb_len": 4,
    "double_return_token_id": 0,
}
derived(
    "hunyuan_i2v",
    "HunyuanVideoImageToVideoPipeline",
    "hunyuan_video",
    llava,
    images=IMAGE,
    video=True,
    prompt_template=TEMPLATE,
)


@call("motif_video", video=True, **CLIP_SIZE, max_sequence_length=32)
def motif_video():
    tokenizer = tokenizers.gemma()
    transformer = model("MotifVideoTransformer3DModel", in_channels=33, out_channels=16, text_embed_dim=DIM)
    given = {"tokenizer": tokenizer, "text_encoder": t5gemma2(tokenizer), "transformer": transformer}
    given |= wan_vae() | {"scheduler": flow(), "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.5)}
    return assembled("MotifVideoPipeline", given)


def t5gemma2(tokenizer: Any) -> Any:
    text = parts.decoder_config(tokenizer) | {"sliding_window": 64, "query_pre_attn_scalar": 16, "dropout_rate": 0.0}
    tower = VISION | {"image_size": 28, "patch_size": 14}
    config = transformers.T5Gemma2EncoderConfig(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return transformers.T5Gemma2Encoder(config)


derived(
    "motif_video_image",
    "MotifVideoImage2VideoPipeline",
    "motif_video",
    lambda given: {
        "feature_extractor": siglip_processor(),
        "transformer": changed(given["transformer"], image_embed_dim=DIM),
    },
    images=IMAGE,
    video=True,
)


@call("i2vgen_xl", video=True, images=IMAGE, height=64, width=64, num_frames=2, target_fps=8, clip_skip=None)
def i2vgen_xl():
    tokenizer = tokenizers.clip()
    return assembled(
        "I2VGenXLPipeline",
        {
            "vae": parts.autoencoder_kl(4),
            "text_encoder": parts.clip_encoder(tokenizer),
            "tokenizer": tokenizer,
            "image_encoder": image_encoder(),
            "feature_extractor": image_processor(),
            "unet": model("I2VGenXLUNet", cross_attention_dim=DIM, sample_size=8),
            "scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False),
        },
    )


@call("kandinsky6", video=True, **CLIP_SIZE, max_sequence_length=32, sample_audio=False)
def kandinsky6():
    tokenizer, tokenizer_2 = vision.qwen_vl_tokenizer(), tokenizers.clip()
    return assembled(
        "Kandinsky6TI2VAPipeline",
        {
            "transformer": model("Kandinsky6Transformer3DModel", in_text_dim=DIM, in_text_dim2=DIM, visual_cond=True),
            "vae": model("AutoencoderKLHunyuanVideo"),
            "text_encoder": vision.qwen25_vl(tokenizer),
            "tokenizer": vision.qwen_vl_processor(tokenizer),
            "text_encoder_2": parts.clip_encoder(tokenizer_2),
            "tokenizer_2": tokenizer_2,
            "scheduler": flow(shift=5.0),
        },
    )


@call("cosmos3", video=True, **CLIP_SIZE, add_resolution_template=False, add_duration_template=False)
def cosmos3():
    tokenizer = vision.qwen_vl_tokenizer()
    transformer = model("Cosmos3OmniTransformer", latent_channel=16, patch_latent_dim=64, vocab_size=len(tokenizer))
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    given = {"transformer": transformer, "text_tokenizer": tokenizer, "scheduler": scheduler} | wan_vae()
    return assembled("Cosmos3OmniPipeline", given, enable_safety_checker=False)


# LTX 2 and what begins, goes on or ends with its models.


def ltx2_vae() -> Any:
    return model("AutoencoderKLLTX2Video", spatial_compression_ratio=32, temporal_compression_ratio=8)


def ltx2_parts(**settings: Any) -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    tokenizer = tokenizers.gemma()
    text = parts.decoder_config(tokenizer) | {"sliding_window": 64, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    heads = {"video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 16}
    heads |= {"audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 16}
    return {
        "scheduler": flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        "vae": ltx2_vae(),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=16
        ),
        "text_encoder": transformers.Gemma3ForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "connectors": LTX2TextConnectors(
            **heads,
            caption_channels=DIM,
            text_proj_in_factor=3,
            video_connector_num_layers=1,
            audio_connector_num_layers=1,
            video_connector_num_learnable_registers=16,
            audio_connector_num_learnable_registers=16,
        ),
        "transformer": model(
            "LTX2VideoTransformer3DModel",
            in_channels=16,
            out_channels=16,
            caption_channels=DIM,
            audio_in_channels=8,
            audio_out_channels=8,
            **settings,
        ),
        "vocoder": LTX2Vocoder(
            in_channels=32,
            hidden_channels=16,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    }


LTX2 = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 32, "spatio_temporal_guidance_blocks": [1]}


@call("ltx2", video=True, **LTX2)
def ltx2():
    return assembled("LTX2Pipeline", ltx2_parts(perturbed_attn=True))


def ltx2_upsampler(_given: dict[str, Any]) -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    return {"latent_upsampler": LTX2LatentUpsamplerModel(in_channels=16, mid_channels=32, num_blocks_per_stage=1)}


def marked(_given: dict[str, Any]) -> dict[str, Any]:
    return ltx2_parts(use_keyframes_abs_pos_embedding=True) | {"scheduler": flow()}


GUIDED = ("spatio_temporal_guidance_blocks",)
UNCOUNTED = (*GUIDED, "num_inference_steps")
derived("ltx2_i2v", "LTX2ImageToVideoPipeline", "ltx2", images=IMAGE, video=True)
derived("ltx2_i2v_as_given", "LTX2ImageToVideoPipeline", "ltx2", images=IMAGE, video=True, image_crf=0)
derived("ltx2_condition", "LTX2ConditionPipeline", "ltx2", video=True)
derived("ltx2_in_context", "LTX2InContextPipeline", "ltx2", video=True)
derived("ltx2_hdr", "LTX2HDRPipeline", "ltx2", video=True, without=GUIDED)
derived("ltx2_keyframes", "LTX2DFRPipeline", "ltx2", marked, video=True, without=UNCOUNTED, num_frames=17)
derived(
    "ltx2_upsample",
    "LTX2LatentUpsamplePipeline",
    "ltx2",
    ltx2_upsampler,
    images={"video": [{}] * 9},
    video=True,
    without=(*UNCOUNTED, "max_sequence_length", "num_frames"),
)


@call("ltx2_decode", steps=None, video=True, images={"latents": {"shape": [1, 16, 2, 4, 4]}})
def ltx2_decode():
    decoder = diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=16,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 8),
        decoder_stage_depths=(1, 1, 1, 1, 1),
        decoder_stage_kernels=((1, 3, 3),) * 4,
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=16,
    )
    given = {"diffusion_decoder": decoder, "scheduler": flow(), "vae": ltx2_vae()}
    return assembled("LTX2VideoDiffusionDecodePipeline", given)


@call(
    "sana_wm",
    video=True,
    images=IMAGE,
    height=64,
    width=64,
    num_frames=9,
    max_sequence_length=32,
    action="w-8",
    intrinsics=[64.0, 64.0, 32.0, 32.0],
    chi_prompt="Describe the image: ",
)
def sana_wm():
    tokenizer = tokenizers.gemma()
    given = {"tokenizer": tokenizer, "text_encoder": parts.gemma2_encoder(tokenizer)}
    given |= {"vae": ltx2_vae(), "scheduler": flow(shift=3.0)}
    transformer = model("SanaWMTransformer3DModel", in_channels=16, caption_channels=DIM, chunk_plucker_channels=48)
    return assembled("SanaWMPipeline", given | {"transformer": transformer})
