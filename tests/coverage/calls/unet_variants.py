"""Stable Diffusion and Stable Diffusion XL called in further ways."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.coverage.calls.derived import derived
from tests.coverage.calls.image_inputs import CONTROL, IMAGE, INPAINT
from tests.coverage.calls.parts import DEPTH, image_encoder, image_processor
from tests.coverage.calls.variants import changed, components, motion_adapter
from tests.pipelines.checkers import processor, safety_checker
from tests.pipelines.unet_families import NOISE_SCHEDULE

BOTH, MASKED = IMAGE | CONTROL, INPAINT | CONTROL
PAG = {"settings": {"pag_applied_layers": "mid"}, "pag_scale": 2.0}
CONDITION = {"conditioning_embedding_out_channels": (8, 8, 8, 8)}
FRAMES = {"conditioning_frames": [{}] * 3}
VIDEO = {"video": [{}] * 3}


def ddim(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False)}


def checked(given: dict[str, Any]) -> dict[str, Any]:
    return ddim(given) | {"safety_checker": safety_checker(), "feature_extractor": processor()}


def widened(**settings: Any):
    """The same, with a U-Net that has other settings."""
    return lambda given: {"unet": changed(given["unet"], **settings)}


def net(given: dict[str, Any]) -> dict[str, Any]:
    return {"controlnet": diffusers.ControlNetModel.from_unet(given["unet"], **CONDITION)}


def union(given: dict[str, Any]) -> dict[str, Any]:
    unet = given["unet"].config
    names = ("down_block_types", "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim")
    names += ("cross_attention_dim", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim")
    names += ("projection_class_embeddings_input_dim", "transformer_layers_per_block")
    more = {"num_control_type": 6, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return {"controlnet": diffusers.ControlNetUnionModel(**{key: unet[key] for key in names}, **more, **CONDITION)}


def cross(given: dict[str, Any]) -> dict[str, Any]:
    """ControlNet-XS, which is half as wide as the U-Net, and takes two layers in each block for granted."""
    whole = changed(given["unet"], layers_per_block=2)
    unet = whole.config
    names = ("down_block_types", "cross_attention_dim", "use_linear_projection", "transformer_layers_per_block")
    adapter = diffusers.ControlNetXSAdapter(
        **{key: unet[key] for key in names},
        **CONDITION,
        num_attention_heads=2,
        block_out_channels=(8, 16),
        base_block_out_channels=unet["block_out_channels"],
        sample_size=8,
        max_norm_num_groups=4,
        upcast_attention=False,
    )
    return {"controlnet": adapter, "unet": whole}


def adapter(_given: dict[str, Any]) -> dict[str, Any]:
    return {"adapter": diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8)}


def adapter_xl(_given: dict[str, Any]) -> dict[str, Any]:
    settings = {"channels": [16, 32, 32, 32], "num_res_blocks": 1, "downscale_factor": 16}
    return {"adapter": diffusers.T2IAdapter(**settings, adapter_type="full_adapter_xl")}


def sparse_control(given: dict[str, Any]) -> dict[str, Any]:
    unet = given["unet"].config
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    controlnet = diffusers.SparseControlNetModel(
        **{key: unet[key] for key in names},
        **CONDITION,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        attention_head_dim=2,
        motion_num_attention_heads=2,
    )
    return {"controlnet": controlnet}


def deep(given: dict[str, Any]) -> dict[str, Any]:
    """A depth estimator, whose map is a fifth channel."""
    config = transformers.DPTConfig(**DEPTH)
    return {
        "unet": changed(given["unet"], in_channels=5),
        "depth_estimator": transformers.DPTForDepthEstimation(config),
        "feature_extractor": transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    }


def seen(given: dict[str, Any]) -> dict[str, Any]:
    return {"image_encoder": image_encoder(), "feature_extractor": image_processor()}


derived("sd_controlnet_inpaint", "StableDiffusionControlNetInpaintPipeline", "sd", net, images=MASKED, strength=0.7)
derived("sd_controlnet_pag", "StableDiffusionControlNetPAGPipeline", "sd", net, images=IMAGE, **PAG)
derived("sd_controlnet_pag_inpaint", "StableDiffusionControlNetPAGInpaintPipeline", "sd", net, images=MASKED, **PAG)
derived("sd_pag_inpaint", "StableDiffusionPAGInpaintPipeline", "sd", images=INPAINT, **PAG, strength=0.7)
derived("sd_controlnet_xs", "StableDiffusionControlNetXSPipeline", "sd", cross, images=IMAGE)
derived("sd_adapter", "StableDiffusionAdapterPipeline", "sd", adapter, images=IMAGE)
derived("sd_pix2pix", "StableDiffusionInstructPix2PixPipeline", "sd", widened(in_channels=8), images=IMAGE)
derived("sd_depth", "StableDiffusionDepth2ImgPipeline", "sd", deep, images=IMAGE, strength=0.7)
derived("sd_variation", "StableDiffusionImageVariationPipeline", "sd", seen, images=IMAGE)
derived("sd_panorama", "StableDiffusionPanoramaPipeline", "sd", ddim, width=128)
derived("sd_self_guided", "StableDiffusionSAGPipeline", "sd", sag_scale=0.75)
derived("sd_safe", "StableDiffusionPipelineSafe", "sd", ddim)
derived(
    "sd_semantic", "SemanticStableDiffusionPipeline", "sd", ddim, editing_prompt=["a black dog"], edit_warmup_steps=1
)
derived("sd_attend", "StableDiffusionAttendAndExcitePipeline", "sd", token_indices=[2, 3], attn_res=(8, 8))
derived(
    "sd_boxes",
    "StableDiffusionGLIGENPipeline",
    "sd",
    widened(attention_type="gated"),
    gligen_phrases=["a dog"],
    gligen_boxes=[[0.1, 0.1, 0.6, 0.6]],
)
# diffusers does not load the folder that it saves of the first without a checker.
derived("sd_zero_video", "TextToVideoZeroPipeline", "sd", checked, video_length=2, t0=1, t1=2)
derived("sdxl_zero_video", "TextToVideoZeroSDXLPipeline", "sdxl", ddim, video_length=2, t0=1, t1=2)

derived("sdxl_controlnet_pag", "StableDiffusionXLControlNetPAGPipeline", "sdxl", net, images=IMAGE, **PAG)
derived("sdxl_controlnet_pag_img2img", "StableDiffusionXLControlNetPAGImg2ImgPipeline", "sdxl", net, images=BOTH, **PAG)
derived("sdxl_pag_img2img", "StableDiffusionXLPAGImg2ImgPipeline", "sdxl", images=IMAGE, **PAG, strength=0.6)
derived("sdxl_pag_inpaint", "StableDiffusionXLPAGInpaintPipeline", "sdxl", images=INPAINT, **PAG, strength=0.7)
derived("sdxl_controlnet_xs", "StableDiffusionXLControlNetXSPipeline", "sdxl", cross, images=IMAGE)
derived("sdxl_adapter", "StableDiffusionXLAdapterPipeline", "sdxl", adapter_xl, images=IMAGE)
derived("sdxl_pix2pix", "StableDiffusionXLInstructPix2PixPipeline", "sdxl", widened(in_channels=8), images=IMAGE)
derived(
    "sdxl_union",
    "StableDiffusionXLControlNetUnionPipeline",
    "sdxl",
    union,
    images={"control_image": [{}]},
    control_mode=[1],
)
derived(
    "sdxl_union_img2img",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "sdxl",
    union,
    images=IMAGE | {"control_image": [{}]},
    control_mode=[1],
    strength=0.6,
)
derived(
    "sdxl_union_inpaint",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "sdxl",
    union,
    images=INPAINT | {"control_image": [{}]},
    control_mode=[1],
    strength=0.7,
)

derived(
    "animate_controlnet",
    "AnimateDiffControlNetPipeline",
    "animate_diff",
    lambda given: net({"unet": plain_unet()}),
    images=FRAMES,
    video=True,
)
derived(
    "animate_sparse",
    "AnimateDiffSparseControlNetPipeline",
    "animate_diff",
    sparse_control,
    images=FRAMES,
    video=True,
    without=("decode_chunk_size",),
    controlnet_frame_indices=[0, 1, 2],
)
derived(
    "animate_v2v",
    "AnimateDiffVideoToVideoPipeline",
    "animate_diff",
    images=VIDEO,
    video=True,
    without=("num_frames",),
    strength=0.7,
)
derived(
    "animate_v2v_controlnet",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "animate_diff",
    lambda given: net({"unet": plain_unet()}),
    images=VIDEO | FRAMES,
    video=True,
    without=("num_frames",),
    strength=0.7,
)
derived(
    "pia",
    "PIAPipeline",
    "animate_diff",
    lambda given: {"unet": changed(plain_unet(), in_channels=9), "motion_adapter": motion_adapter()},
    images=IMAGE,
    video=True,
    without=("decode_chunk_size",),
)


def plain_unet() -> Any:
    return components("sd")["unet"]
