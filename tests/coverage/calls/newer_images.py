"""Image pipelines with text encoders, autoencoders or ways of their own."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.models.autoencoders.vq_model import VQModel

from tests.coverage.calls.derived import assembled, derived, model
from tests.coverage.calls.image_inputs import IMAGE, INPAINT
from tests.coverage.calls.parts import image_encoder, image_processor
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import SMALL, changed, components
from tests.pipelines import parts, tokenizers, vision
from tests.pipelines.checkers import processor, safety_checker
from tests.pipelines.parts import DIM
from tests.pipelines.unet_families import NOISE_SCHEDULE

AXES = (4, 6, 6)


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def qwen3_vl(*, layers: int = 3, bare: bool = False) -> dict[str, Any]:
    """Qwen 3 VL with its processor."""
    tokenizer = vision.qwen_vl_tokenizer()
    return {
        "tokenizer": tokenizer,
        "processor": vision.qwen3_vl_processor(tokenizer),
        "text_encoder": vision.qwen3_vl(tokenizer, layers=layers, bare=bare),
    }


@call("krea2", **SMALL, max_sequence_length=32)
def krea2():
    given = qwen3_vl(bare=True, layers=4)
    given |= {"vae": diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)}
    given |= {"transformer": model("Krea2Transformer2DModel", in_channels=64, text_hidden_dim=DIM)}
    given |= {"scheduler": flow(use_dynamic_shifting=True)}
    return assembled("Krea2Pipeline", given, text_encoder_select_layers=(1, 2, 3))


@call("qwen_image21", **SMALL, true_cfg_scale=2.0, negative_prompt=" ", output_resolution=64, use_kv_cache=False)
def qwen_image21():
    vae = model("AutoencoderKLQwenImage21", dim_mult=[1, 1, 1, 1, 1], temperal_downsample=[False] * 4)
    transformer = model("QwenImage21Transformer2DModel", in_channels=8, out_channels=8, context_in_dim=DIM)
    return assembled("QwenImage21Pipeline", qwen3_vl() | {"vae": vae, "transformer": transformer, "scheduler": flow()})


@call("joy_image_edit", steps=1, images=IMAGE, **SMALL, max_sequence_length=64)
def joy_image_edit():
    transformer = model("JoyImageEditTransformer3DModel", in_channels=16, text_dim=DIM)
    return assembled("JoyImageEditPipeline", qwen3_vl() | wan_vae() | {"transformer": transformer, "scheduler": flow()})


@call("joy_image_edit_plus", images={"images": [{}]}, **SMALL, max_sequence_length=64)
def joy_image_edit_plus():
    transformer = model("JoyImageEditPlusTransformer3DModel", in_channels=16, text_dim=DIM)
    given = qwen3_vl() | wan_vae() | {"transformer": transformer, "scheduler": flow()}
    return assembled("JoyImageEditPlusPipeline", given)


def wan_vae() -> dict[str, Any]:
    return {"vae": diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)}


def flux2_vae() -> dict[str, Any]:
    return {"vae": components("flux2")["vae"]}


@call("nucleus_moe", **SMALL, max_sequence_length=64, return_index=-2, guidance_scale=4.0)
def nucleus_moe():
    transformer = model("NucleusMoEImageTransformer2DModel", in_channels=64, out_channels=16, joint_attention_dim=DIM)
    given = qwen3_vl() | {"vae": diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)}
    return assembled("NucleusMoEImagePipeline", given | {"transformer": transformer, "scheduler": flow()})


@call("bria_fibo2", **SMALL, guidance_scale=4.0)
def bria_fibo2():
    transformer = model("BriaFibo2Transformer2DModel", in_channels=8, cap_feat_dim=3 * DIM)
    given = qwen3_vl(layers=37) | flux2_vae() | {"transformer": transformer, "scheduler": flow()}
    return assembled("BriaFibo2Pipeline", given)


@call("ideogram4", **SMALL, max_sequence_length=256, guidance_schedule=[4.0, 4.0, 4.0])
def ideogram4():
    given = qwen3_vl(layers=36, bare=True) | flux2_vae() | {"scheduler": flow()}
    for name in ("transformer", "unconditional_transformer"):
        given |= {name: model("Ideogram4Transformer2DModel", in_channels=32, llm_features_dim=13 * DIM)}
    return assembled("Ideogram4Pipeline", given)


def dream_lite(kind: str) -> Any:
    unet = model("DreamLiteUNetModel", in_channels=4, cross_attention_dim=DIM)
    names = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")
    vae = diffusers.AutoencoderTiny(**dict(zip(names, ((8,) * 4, (8,) * 4, (1,) * 4, (1,) * 4), strict=True)))
    return assembled(kind, qwen3_vl() | {"unet": unet, "vae": vae, "scheduler": flow(use_dynamic_shifting=True)})


@call("dream_lite", **SMALL, guidance_scale=3.5)
def dream_lite_pipeline():
    return dream_lite("DreamLitePipeline")


@call("dream_lite_mobile", **SMALL)
def dream_lite_mobile():
    return dream_lite("DreamLiteMobilePipeline")


@call("prx", **SMALL, use_resolution_binning=False, skip_text_cleaning=True, tokenizer_max_length=32)
def prx():
    tokenizer = tokenizers.gemma(max_length=32)
    return assembled(
        "PRXPipeline",
        {
            "transformer": diffusers.PRXTransformer2DModel(
                in_channels=16, context_in_dim=DIM, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
            ),
            "scheduler": flow(),
            "text_encoder": parts.t5gemma_encoder(tokenizer),
            "tokenizer": tokenizer,
            "vae": parts.flux_autoencoder(),
        },
    )


@call("prx_pixel", **SMALL, use_resolution_binning=False)
def prx_pixel():
    tokenizer = tokenizers.qwen(max_length=32)
    return assembled(
        "PRXPixelPipeline",
        {
            "transformer": diffusers.PRXTransformer2DModel(
                in_channels=3,
                context_in_dim=DIM,
                hidden_size=32,
                num_heads=2,
                depth=2,
                axes_dim=[8, 8],
                patch_size=8,
                bottleneck_size=16,
            ),
            "scheduler": flow(),
            "text_encoder": parts.qwen3_encoder(tokenizer),
            "tokenizer": tokenizer,
        },
        prompt_max_tokens=32,
    )


@call("hidream", **SMALL, max_sequence_length=32)
def hidream():
    given: dict[str, Any] = {"scheduler": flow(shift=3.0), "vae": parts.flux_autoencoder()}
    for name, made in {"": tokenizers.clip(), "_2": tokenizers.clip(), "_3": tokenizers.t5()}.items():
        encoder = parts.t5_encoder(made) if name == "_3" else parts.clip_encoder(made, projection=True)
        given |= {f"tokenizer{name}": made, f"text_encoder{name}": encoder}
    tokenizer = tokenizers.qwen()
    config = transformers.LlamaConfig(**parts.decoder_config(tokenizer, layers=4))
    given |= {"tokenizer_4": tokenizer, "text_encoder_4": transformers.LlamaForCausalLM(config)}
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[DIM, DIM],
        text_emb_dim=2 * DIM,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=AXES,
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return assembled("HiDreamImagePipeline", given | {"transformer": transformer})


def byt5() -> dict[str, Any]:
    tokenizer = transformers.ByT5Tokenizer()
    return {"tokenizer_2": tokenizer, "text_encoder_2": parts.t5_encoder(tokenizer)}


@call("hunyuan_image", **SMALL)
def hunyuan_image():
    tokenizer = tokenizers.qwen(max_length=1200)
    vae = model(
        "AutoencoderKLHunyuanImage",
        block_out_channels=(32, 64, 64, 64),
        spatial_compression_ratio=8,
        scaling_factor=0.75,
    )
    given = {"tokenizer": tokenizer, "text_encoder": parts.qwen25_vl_encoder(tokenizer), "vae": vae}
    transformer = model(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, text_embed_dim=DIM, text_embed_2_dim=DIM
    )
    guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5)
    given |= byt5() | {"transformer": transformer, "scheduler": flow(), "guider": guider}
    return assembled("HunyuanImagePipeline", given)


@call("hunyuan_image_refiner", images=IMAGE, **SMALL)
def hunyuan_image_refiner():
    tokenizer = tokenizers.qwen(max_length=1200)
    vae = model(
        "AutoencoderKLHunyuanImageRefiner",
        block_out_channels=(8, 16, 16, 16, 16),
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    transformer = model(
        "HunyuanImageTransformer2DModel",
        in_channels=16,
        out_channels=8,
        text_embed_dim=DIM,
        rope_axes_dim=AXES,
        patch_size=(1, 1, 1),
    )
    given = {"tokenizer": tokenizer, "text_encoder": parts.qwen25_vl_encoder(tokenizer), "vae": vae}
    given |= {"guider": diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5)}
    return assembled("HunyuanImageRefinerPipeline", given | {"transformer": transformer, "scheduler": flow()})


def kandinsky5_vae(given: dict[str, Any]) -> dict[str, Any]:
    transformer = changed(given["transformer"], in_visual_dim=16, out_visual_dim=16)
    return {"vae": parts.flux_autoencoder(), "transformer": transformer}


VIDEO_ONLY = ("num_frames",)
derived("kandinsky5_image", "Kandinsky5T2IPipeline", "kandinsky5_video", kandinsky5_vae, **SMALL, without=VIDEO_ONLY)


def kandinsky5_sees(given: dict[str, Any]) -> dict[str, Any]:
    tokenizer = vision.qwen_vl_tokenizer()
    seen = {"tokenizer": vision.qwen_vl_processor(tokenizer), "text_encoder": vision.qwen25_vl(tokenizer)}
    transformer = changed(given["transformer"], in_visual_dim=16, out_visual_dim=16, visual_cond=True)
    return seen | {"vae": parts.flux_autoencoder(), "transformer": transformer}


derived(
    "kandinsky5_edit",
    "Kandinsky5I2IPipeline",
    "kandinsky5_video",
    kandinsky5_sees,
    images=IMAGE,
    **SMALL,
    without=VIDEO_ONLY,
    max_sequence_length=512,
)

# Stable Diffusion's kin with other encoders or autoencoders.


def ddim(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False)}


def cycled(_given: dict[str, Any]) -> dict[str, Any]:
    """With some noise left after the last step, by which the call divides."""
    return {"scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)}


def deep(given: dict[str, Any]) -> dict[str, Any]:
    return {"vae": changed(given["vae"], in_channels=6, out_channels=6)}


def enlarging(given: dict[str, Any]) -> dict[str, Any]:
    unet = changed(given["unet"], in_channels=7, num_class_embeds=1000)
    return {"unet": unet, "low_res_scheduler": diffusers.DDPMScheduler(**NOISE_SCHEDULE)}


def enlarging_latents(given: dict[str, Any]) -> dict[str, Any]:
    unet = changed(given["unet"], in_channels=8, out_channels=5, time_cond_proj_dim=128 + DIM)
    return {"unet": unet, "scheduler": diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE)}


def inverted(given: dict[str, Any]) -> dict[str, Any]:
    return ddim(given) | {"inverse_scheduler": diffusers.DDIMInverseScheduler(**NOISE_SCHEDULE)}


def boxed(given: dict[str, Any]) -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

    tokenizer = given["tokenizer"]
    return {
        "unet": changed(given["unet"], attention_type="gated-text-image"),
        "processor": transformers.CLIPProcessor(image_processor(), tokenizer),
        "image_encoder": image_encoder(),
        "image_project": CLIPImageProjection(hidden_size=DIM),
    }


def checked(_given: dict[str, Any]) -> dict[str, Any]:
    """With a checker, without which diffusers does not load the folder."""
    return {"safety_checker": safety_checker(), "feature_extractor": processor()}


SIDES = ("height", "width")
derived("sd_cycle", "CycleDiffusionPipeline", "sd", cycled, images=IMAGE, source_prompt="a red dog", strength=0.7)
derived("sd_legacy_inpaint", "StableDiffusionInpaintPipelineLegacy", "sd", checked, images=INPAINT, strength=0.7)
derived("sd_edited", "StableDiffusionModelEditingPipeline", "sd")
derived(
    "sd_parallel",
    "StableDiffusionParadigmsPipeline",
    "sd",
    lambda given: {"scheduler": diffusers.DDIMParallelScheduler(**NOISE_SCHEDULE, clip_sample=False)},
    parallel=2,
)
derived(
    "sd_pix2pix_zero",
    "StableDiffusionPix2PixZeroPipeline",
    "sd",
    lambda given: inverted(given) | {"caption_generator": None, "caption_processor": None},
    images={"source_embeds": {"shape": [2, 77, DIM]}, "target_embeds": {"shape": [2, 77, DIM]}},
)
derived(
    "sd_diff_edit",
    "StableDiffusionDiffEditPipeline",
    "sd",
    inverted,
    images={"mask_image": {"shape": [1, 8, 8], "dtype": "bool"}, "image_latents": {"shape": [1, 3, 4, 8, 8]}},
    without=SIDES,
    inpaint_strength=1.0,
)
derived(
    "sd_boxes_image",
    "StableDiffusionGLIGENTextImagePipeline",
    "sd",
    boxed,
    images={"gligen_images": [{}]},
    gligen_phrases=["a dog"],
    gligen_boxes=[[0.1, 0.1, 0.6, 0.6]],
)
derived("sd_depth_picture", "StableDiffusionLDM3DPipeline", "sd", deep, output="np")
derived(
    "sd_enlarge",
    "StableDiffusionUpscalePipeline",
    "sd",
    enlarging,
    images={"image": {"height": 16, "width": 16}},
    without=SIDES,
)
derived(
    "sd_enlarge_latents",
    "StableDiffusionLatentUpscalePipeline",
    "sd",
    enlarging_latents,
    without=SIDES,
    images={"image": {"shape": [1, 4, 8, 8]}},
)


@call("ldm_text", **SMALL, guidance_scale=4.0)
def ldm_text():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    given, tokenizer = components("sd"), tokenizers.bert()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        d_model=DIM,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=16,
        max_position_embeddings=80,
    )
    own = {"bert": LDMBertModel(config), "tokenizer": tokenizer, "vqvae": given["vae"], "unet": given["unet"]}
    return assembled("LDMTextToImagePipeline", own | ddim({}))


def amused_parts() -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    encoder = parts.clip_encoder(tokenizer, projection=True)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vqvae": VQModel(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            latent_channels=8,
            num_vq_embeddings=32,
            norm_num_groups=4,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        ),
        "transformer": model(
            "UVit2DModel",
            cond_embed_dim=DIM,
            encoder_hidden_size=DIM,
            codebook_size=32,
            vocab_size=33,
            micro_cond_embed_dim=5 * 8,
        ),
        "scheduler": diffusers.AmusedScheduler(mask_token_id=32),
    }


@call("amused", **SMALL)
def amused():
    return assembled("AmusedPipeline", amused_parts())


derived("amused_img2img", "AmusedImg2ImgPipeline", "amused", images=IMAGE, strength=0.7, without=SIDES)
derived("amused_inpaint", "AmusedInpaintPipeline", "amused", images=INPAINT, strength=0.7, without=SIDES)
