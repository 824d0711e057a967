"""Pipelines of several models after one another: a prior's embedding, a picture, the picture enlarged."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from tests.coverage.calls.derived import assembled, derived
from tests.coverage.calls.image_inputs import IMAGE, INPAINT
from tests.coverage.calls.parts import image_encoder, image_processor
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import changed
from tests.pipelines import parts, tokenizers
from tests.pipelines.parts import DIM

EMBEDS = {"image_embeds": {"shape": [1, DIM]}, "negative_image_embeds": {"shape": [1, DIM]}}
HINT = {"hint": {"shape": [1, 3, 64, 64]}}
SIDES = ("height", "width")
STEPS = ("num_inference_steps", "guidance_scale")

# DeepFloyd IF: the picture is noised again at twice its size, and the noise level is a class.


def enlarging(given: dict[str, Any]) -> dict[str, Any]:
    unet = changed(given["unet"], in_channels=6, class_embed_type="timestep")
    return {"unet": unet, "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")}


def marking(given: dict[str, Any]) -> dict[str, Any]:
    """With what diffusers does not load the folder without."""
    from diffusers.pipelines.deepfloyd_if import IFWatermarker

    return enlarging(given) | {"watermarker": IFWatermarker()}


SMALL_IMAGE = {"image": {"height": 16, "width": 16}}
derived("if_img2img", "IFImg2ImgPipeline", "deepfloyd_if", images=SMALL_IMAGE, without=SIDES, strength=0.7)
derived(
    "if_inpaint",
    "IFInpaintingPipeline",
    "deepfloyd_if",
    images=SMALL_IMAGE | {"mask_image": {"height": 16, "width": 16}},
    without=SIDES,
    strength=0.7,
)
derived(
    "if_enlarge",
    "IFSuperResolutionPipeline",
    "deepfloyd_if",
    enlarging,
    images={"image": {"height": 8, "width": 8}},
    noise_level=20,
)
derived(
    "if_img2img_enlarge",
    "IFImg2ImgSuperResolutionPipeline",
    "deepfloyd_if",
    marking,
    images={"image": {"height": 8, "width": 8}, "original_image": {"height": 16, "width": 16}},
    without=SIDES,
    noise_level=20,
)
derived(
    "if_inpaint_enlarge",
    "IFInpaintingSuperResolutionPipeline",
    "deepfloyd_if",
    enlarging,
    images={
        "image": {"height": 8, "width": 8},
        "original_image": {"height": 16, "width": 16},
        "mask_image": {"height": 16, "width": 16},
    },
    without=SIDES,
    noise_level=20,
)

# Kandinsky 2.1 and 2.2: a prior makes an image's embedding of the text.


def prior_model(**settings: Any) -> Any:
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": DIM}
    return diffusers.PriorTransformer(**shape | {"num_embeddings": 77} | settings)


def movq() -> Any:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        norm_type="group",
    )


def kandinsky_unet(**settings: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "attention_head_dim": 8,
            "cross_attention_dim": DIM,
            "encoder_hid_dim": DIM,
            "resnet_time_scale_shift": "scale_shift",
        }
        | settings
    )


@call("kandinsky_prior", gives="an embedding")
def kandinsky_prior():
    tokenizer = tokenizers.clip()
    return diffusers.KandinskyPriorPipeline(
        prior=prior_model(),
        image_encoder=image_encoder(),
        text_encoder=parts.clip_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        scheduler=unclip_scheduler("sample", clip_sample_range=5.0),
        image_processor=image_processor(),
    )


def unclip_scheduler(prediction: str, **settings: Any) -> Any:
    return diffusers.schedulers.UnCLIPScheduler(prediction_type=prediction, variance_type="fixed_small_log", **settings)


def learned() -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )


@call("kandinsky", images=EMBEDS, height=64, width=64, guidance_scale=4.0)
def kandinsky():
    tokenizer = tokenizers.xlm_roberta()
    config = MCLIPConfig(
        transformerDimSize=DIM,
        imageDimSize=DIM,
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        pad_token_id=tokenizer.pad_token_id,
    )
    return diffusers.KandinskyPipeline(
        text_encoder=MultilingualCLIP(config),
        tokenizer=tokenizer,
        unet=kandinsky_unet(
            encoder_hid_dim_type="text_image_proj",
            addition_embed_type="text_image",
            cross_attention_dim=DIM,
        ),
        scheduler=learned(),
        movq=movq(),
    )


@call("kandinsky22", images=EMBEDS, height=64, width=64, guidance_scale=4.0)
def kandinsky22():
    unet = kandinsky_unet(encoder_hid_dim_type="image_proj", addition_embed_type="image")
    return diffusers.KandinskyV22Pipeline(unet=unet, scheduler=learned(), movq=movq())


def hinted(given: dict[str, Any]) -> dict[str, Any]:
    return {"unet": changed(given["unet"], addition_embed_type="image_hint", in_channels=8)}


def masked(given: dict[str, Any]) -> dict[str, Any]:
    return {"unet": changed(given["unet"], in_channels=9)}


def ddim(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)}


def from_prior(*changes: Any):
    """A prior's components beside those of the decoder, which `changes` change."""

    def make(given: dict[str, Any]) -> dict[str, Any]:
        prior = kandinsky_prior().components
        for change in changes:
            given = given | change(given)
        return given | {f"prior_{name}": part for name, part in prior.items()}

    return make


COMBINED = {"prior_num_inference_steps": 2}
derived("kandinsky_img2img", "KandinskyImg2ImgPipeline", "kandinsky", ddim, images=EMBEDS | IMAGE, strength=0.7)
derived(
    "kandinsky_inpaint",
    "KandinskyInpaintPipeline",
    "kandinsky",
    lambda given: ddim(given) | masked(given),
    images=EMBEDS | INPAINT,
)
derived("kandinsky_combined", "KandinskyCombinedPipeline", "kandinsky", from_prior(), **COMBINED)
derived(
    "kandinsky_img2img_combined",
    "KandinskyImg2ImgCombinedPipeline",
    "kandinsky",
    from_prior(ddim),
    images=IMAGE,
    strength=0.7,
    **COMBINED,
)
derived(
    "kandinsky_inpaint_combined",
    "KandinskyInpaintCombinedPipeline",
    "kandinsky",
    from_prior(ddim, masked),
    images=INPAINT,
    **COMBINED,
)
derived("kandinsky22_prior", "KandinskyV22PriorPipeline", "kandinsky_prior", gives="an embedding")
derived(
    "kandinsky22_prior_image",
    "KandinskyV22PriorEmb2EmbPipeline",
    "kandinsky_prior",
    images=IMAGE,
    strength=0.7,
    gives="an embedding",
)
derived("kandinsky22_img2img", "KandinskyV22Img2ImgPipeline", "kandinsky22", images=EMBEDS | IMAGE, strength=0.7)
derived("kandinsky22_inpaint", "KandinskyV22InpaintPipeline", "kandinsky22", masked, images=EMBEDS | INPAINT)
derived("kandinsky22_controlnet", "KandinskyV22ControlnetPipeline", "kandinsky22", hinted, images=EMBEDS | HINT)
derived(
    "kandinsky22_controlnet_img2img",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "kandinsky22",
    hinted,
    images=EMBEDS | HINT | IMAGE,
    strength=0.7,
)
derived("kandinsky22_combined", "KandinskyV22CombinedPipeline", "kandinsky22", from_prior(), **COMBINED)
derived(
    "kandinsky22_img2img_combined",
    "KandinskyV22Img2ImgCombinedPipeline",
    "kandinsky22",
    from_prior(),
    images=IMAGE,
    strength=0.7,
    **COMBINED,
)
derived(
    "kandinsky22_inpaint_combined",
    "KandinskyV22InpaintCombinedPipeline",
    "kandinsky22",
    from_prior(masked),
    images=INPAINT,
    **COMBINED,
)

# Stable unCLIP.


def unclip_parts(given: dict[str, Any]) -> dict[str, Any]:
    unet = changed(
        given["unet"],
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * DIM,
        num_class_embeds=None,
    )
    return {
        "unet": unet,
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=DIM),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "image_encoder": image_encoder(),
        "feature_extractor": image_processor(),
    }


def stable_prior(given: dict[str, Any]) -> dict[str, Any]:
    prior = kandinsky_prior().components
    mine = {"prior_tokenizer": prior["tokenizer"], "prior_text_encoder": prior["text_encoder"]}
    return unclip_parts(given) | mine | {"prior": prior["prior"], "prior_scheduler": prior["scheduler"]}


derived("stable_unclip", "StableUnCLIPPipeline", "sd", stable_prior, prior_num_inference_steps=2)
derived("stable_unclip_img2img", "StableUnCLIPImg2ImgPipeline", "sd", unclip_parts, images=IMAGE)


# Stable Cascade: what decodes its embeddings is a class that diffusers saves and does not load.


def text(prefix: str = "", *, projection: bool) -> dict[str, Any]:
    tokenizer = tokenizers.clip()
    encoder = parts.clip_encoder(tokenizer, projection=projection)
    return {f"{prefix}tokenizer": tokenizer, f"{prefix}text_encoder": encoder}


def cascade_unet(**settings: Any) -> Any:
    shape = {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16, "conditioning_dim": 32}
    shape |= {"block_out_channels": (16, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1)}
    shape |= {"up_num_layers_per_block": (1, 1), "switch_level": (False,), "clip_text_pooled_in_channels": DIM}
    return StableCascadeUNet(**shape | settings)


SCHEDULER = diffusers.DDPMWuerstchenScheduler


def cascade_prior_model() -> Any:
    return cascade_unet(clip_text_in_channels=DIM, clip_image_in_channels=DIM)


@call("cascade_prior", gives="an embedding", height=128, width=128, guidance_scale=4.0)
def cascade_prior():
    given = text(projection=True) | {"prior": cascade_prior_model(), "scheduler": SCHEDULER()}
    return assembled("StableCascadePriorPipeline", given)
