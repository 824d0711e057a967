"""Further pipelines from text to an image."""

from __future__ import annotations

import diffusers
import transformers
from diffusers.models.autoencoders.vq_model import VQModel

from tests.coverage.calls.registry import call
from tests.pipelines import parts, tokenizers

SMALL = {"height": 64, "width": 64}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding
COG = {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@call("cogview3_plus", **SMALL, max_sequence_length=32)
def cogview3_plus():
    tokenizer = tokenizers.t5()
    return diffusers.CogView3PlusPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        vae=parts.autoencoder_kl(4),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            **HEADS,
            text_embed_dim=parts.DIM,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(**COG),
    )


@call("cogview4", **SMALL, max_sequence_length=32)
def cogview4():
    tokenizer = tokenizers.gemma(padding_side="left")
    config = transformers.GlmConfig(**parts.decoder_config(tokenizer), partial_rotary_factor=0.5)
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GlmModel(config),
        vae=parts.autoencoder_kl(4),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            **HEADS,
            text_embed_dim=parts.DIM,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )


@call("lumina", **SMALL, max_sequence_length=32, clean_caption=False)
def lumina():
    tokenizer = tokenizers.gemma()
    return diffusers.LuminaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GemmaModel(transformers.GemmaConfig(**parts.decoder_config(tokenizer))),
        vae=parts.autoencoder_kl(4),
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=parts.DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


@call("bria", **SMALL, max_sequence_length=32)
def bria():
    tokenizer = tokenizers.t5()
    return diffusers.BriaPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        vae=parts.autoencoder_kl(4, shift_factor=0.0),
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            **HEADS,
            joint_attention_dim=parts.DIM,
            axes_dims_rope=list(AXES),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@call("bria_fibo", **SMALL, max_sequence_length=32, negative_prompt="old")
def bria_fibo():
    tokenizer = tokenizers.qwen()
    # diffusers has token 128000 for an empty prompt.
    config = transformers.SmolLM3Config(**parts.decoder_config(tokenizer, layers=4) | {"vocab_size": 128001})
    return diffusers.BriaFiboPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.SmolLM3ForCausalLM(config),
        vae=diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=16),
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            **HEADS,
            joint_attention_dim=2 * parts.DIM,
            text_encoder_dim=parts.DIM,
            axes_dims_rope=list(AXES),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@call("ovis_image", **SMALL, max_sequence_length=64)
def ovis_image():
    tokenizer = tokenizers.qwen()
    return diffusers.OvisImagePipeline(
        tokenizer=tokenizer,
        text_encoder=parts.qwen3_encoder(tokenizer),
        vae=parts.flux_autoencoder(),
        transformer=diffusers.OvisImageTransformer2DModel(
            num_layers=2, num_single_layers=2, **HEADS, axes_dims_rope=AXES, joint_attention_dim=parts.DIM
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@call("longcat_image", **SMALL, enable_prompt_rewrite=False)
def longcat_image():
    tokenizer = tokenizers.qwen()
    return diffusers.LongCatImagePipeline(
        tokenizer=tokenizer,
        text_processor=tokenizer,  # the real one knows images, too
        text_encoder=parts.qwen25_vl_encoder(tokenizer),
        vae=parts.flux_autoencoder(),
        transformer=diffusers.LongCatImageTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            **HEADS,
            axes_dims_rope=list(AXES),
            joint_attention_dim=parts.DIM,
            pooled_projection_dim=parts.DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@call("kandinsky3", **SMALL)
def kandinsky3():
    tokenizer = tokenizers.t5()
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        unet=diffusers.Kandinsky3UNet(
            time_embedding_dim=16,
            groups=2,  # of several values each at the lowest level, too
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32, 32, 32),
            cross_attention_dim=16,
            encoder_hid_dim=parts.DIM,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=False, clip_sample=True),
        movq=VQModel(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 3 + ("AttnUpDecoderBlock2D",),
            block_out_channels=(32, 32, 32, 32),
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=16,
            norm_num_groups=4,
            norm_type="group",  # spatial as in the real one would enlarge rounding with random weights
        ),
    )


@call("ernie_image", **SMALL, use_pe=False)
def ernie_image():
    tokenizer = tokenizers.qwen(max_length=224)
    config = transformers.MistralConfig(**parts.decoder_config(tokenizer))
    return diffusers.ErnieImagePipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.MistralModel(config),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=8
        ),
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=48,
            in_channels=32,
            out_channels=32,
            text_in_dim=parts.DIM,
            rope_axes_dim=AXES,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@call("deepfloyd_if", height=16, width=16, clean_caption=False)
def deepfloyd_if():
    tokenizer = tokenizers.t5(max_length=77)
    return diffusers.IFPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=parts.DIM,
            encoder_hid_dim=parts.DIM,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            class_embed_type=None,
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True, prediction_type="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
