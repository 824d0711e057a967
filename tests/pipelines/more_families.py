"""Further image families: one each for what the required five do not show (other encoders, VAEs, guidance)."""

import diffusers

from tests.pipelines import parts, tokenizers
from tests.pipelines.registry import family

AXES = (4, 6, 6)  # how a head of 16 is divided among the axes of the rotary embedding


@family("chroma", height=64, width=64, guidance_scale=5.0, max_sequence_length=32)
def chroma():
    tokenizer = tokenizers.t5()
    return diffusers.ChromaPipeline(
        vae=parts.flux_autoencoder(),
        text_encoder=parts.t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=AXES,
            joint_attention_dim=parts.DIM,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@family("auraflow", height=64, width=64, guidance_scale=3.5, max_sequence_length=32)
def auraflow():
    tokenizer = tokenizers.t5()
    return diffusers.AuraFlowPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.13025),
        text_encoder=parts.t5_encoder(tokenizer, multilingual=True),
        tokenizer=tokenizer,
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_projection_dim=32,
            joint_attention_dim=parts.DIM,
            pos_embed_max_size=64,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


@family(
    "sana",
    height=64,
    width=64,
    guidance_scale=4.5,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=["Describe the image of the user.", "User Prompt: "],  # the real one has 1,000 letters
)
def sana():
    tokenizer = tokenizers.gemma()
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    return diffusers.SanaPipeline(
        vae=diffusers.AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,), (5,)),
            decoder_qkv_multiscales=((), (), (5,), (5,)),
            scaling_factor=0.41407,
        ),
        text_encoder=parts.gemma2_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.SanaTransformer2DModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=parts.DIM,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@family("lumina2", height=64, width=64, guidance_scale=4.0, max_sequence_length=128)
def lumina2():
    tokenizer = tokenizers.gemma()
    return diffusers.Lumina2Pipeline(
        vae=parts.flux_autoencoder(),
        text_encoder=parts.gemma2_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=AXES,
            axes_lens=(256, 64, 64),
            cap_feat_dim=parts.DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


@family("z_image", height=64, width=64, guidance_scale=4.0, max_sequence_length=64)
def z_image():
    tokenizer = tokenizers.qwen()
    return diffusers.ZImagePipeline(
        vae=parts.flux_autoencoder(),
        text_encoder=parts.qwen3_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=parts.DIM,
            axes_dims=list(AXES),
            axes_lens=[256, 64, 64],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@family("qwen_image", height=64, width=64, true_cfg_scale=4.0, negative_prompt=" ", max_sequence_length=64)
def qwen_image():
    tokenizer = tokenizers.qwen()
    return diffusers.QwenImagePipeline(
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=parts.qwen25_vl_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=AXES,
            joint_attention_dim=parts.DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@family("hunyuan_dit", height=64, width=64, guidance_scale=5.0, use_resolution_binning=False)
def hunyuan_dit():
    tokenizer, tokenizer_2 = tokenizers.bert(), tokenizers.t5()
    return diffusers.HunyuanDiTPipeline(
        vae=parts.autoencoder_kl(4, scaling_factor=0.13025),
        text_encoder=parts.bert_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            in_channels=4,
            patch_size=2,
            hidden_size=32,
            num_layers=4,  # the last takes a skip connection from the first
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=parts.DIM,
            cross_attention_dim_t5=parts.DIM,
            pooled_projection_dim=parts.DIM,
        ),
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.03),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux2_transformer(*, guidance_embeds: bool):
    return diffusers.Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=3 * parts.DIM,  # three layers of the text encoder side by side
        timestep_guidance_channels=32,
        guidance_embeds=guidance_embeds,
    )


def flux2_autoencoder():
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=8
    )


@family(
    "flux2",
    height=64,
    width=64,
    guidance_scale=4.0,
    max_sequence_length=256,
    text_encoder_out_layers=(1, 2, 3),
)
def flux2():
    tokenizer = tokenizers.qwen()  # stands for PixtralProcessor: with text alone both are a chat template
    return diffusers.Flux2Pipeline(
        vae=flux2_autoencoder(),
        text_encoder=parts.mistral3_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@family(
    "flux2_klein",
    height=64,
    width=64,
    guidance_scale=4.0,
    max_sequence_length=64,
    text_encoder_out_layers=(1, 2, 3),
)
def flux2_klein():
    tokenizer = tokenizers.qwen()
    return diffusers.Flux2KleinPipeline(
        vae=flux2_autoencoder(),
        text_encoder=parts.qwen3_encoder(tokenizer, layers=4, causal_lm=True),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
