"""Video pipelines called in further ways, and with the denoisers of their kin."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from tests.coverage.calls.derived import derived, model
from tests.coverage.calls.image_inputs import IMAGE
from tests.coverage.calls.parts import image_encoder, image_processor
from tests.coverage.calls.variants import changed
from tests.pipelines.parts import DIM

WAN = {"in_channels": 16, "out_channels": 16, "text_dim": DIM}
VIDEO = {"video": [{}] * 5}
FRAMES = ("num_frames",)


def wan_like(kind: str, **settings: Any):
    return lambda _given: {"transformer": model(kind, **WAN | settings)}


def with_vision(kind: str, **settings: Any):
    def parts(_given: dict[str, Any]) -> dict[str, Any]:
        return {
            "transformer": model(kind, **WAN | {"in_channels": 36, "image_dim": DIM} | settings),
            "image_encoder": image_encoder(projection=False, layers=3),
            "image_processor": image_processor(),
        }

    return parts


def any_flow_far(_given: dict[str, Any]) -> dict[str, Any]:
    transformer = model("AnyFlowFARTransformer3DModel", **WAN, chunk_partition=(1, 1), full_chunk_limit=2)
    return {"transformer": transformer, "scheduler": diffusers.FlowMapEulerDiscreteScheduler()}


def helios(_given: dict[str, Any]) -> dict[str, Any]:
    return {"transformer": model("HeliosTransformer3DModel", **WAN), "scheduler": diffusers.HeliosScheduler(stages=1)}


def pyramid(given: dict[str, Any]) -> dict[str, Any]:
    return helios(given) | {"scheduler": diffusers.HeliosScheduler(stages=3)}


def upsampler(_given: dict[str, Any]) -> dict[str, Any]:
    settings = {"in_channels": 16, "mid_channels": 32, "num_blocks_per_stage": 1}
    return {"latent_upsampler": LTXLatentUpsamplerModel(**settings)}


def flow(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}


derived(
    "wan_lucy",
    "LucyEditPipeline",
    "wan",
    lambda given: {"transformer": changed(given["transformer"], in_channels=32)},
    images=VIDEO,
    video=True,
)
derived(
    "chrono_edit", "ChronoEditPipeline", "wan", with_vision("ChronoEditTransformer3DModel"), images=IMAGE, video=True
)
derived(
    "wan_animate",
    "WanAnimatePipeline",
    "wan",
    with_vision("WanAnimateTransformer3DModel", latent_channels=16),
    images=IMAGE | {"pose_video": [{}] * 5, "face_video": [{"height": 16, "width": 16}] * 5},
    video=True,
    without=FRAMES,
    segment_frame_length=5,
)
derived("any_flow_far", "AnyFlowFARPipeline", "wan", any_flow_far, video=True)
derived(
    "skyreels_i2v",
    "SkyReelsV2ImageToVideoPipeline",
    "skyreels_v2",
    with_vision("SkyReelsV2Transformer3DModel"),
    images=IMAGE,
    video=True,
)
derived("skyreels_forced", "SkyReelsV2DiffusionForcingPipeline", "skyreels_v2", video=True)
derived(
    "skyreels_forced_i2v", "SkyReelsV2DiffusionForcingImageToVideoPipeline", "skyreels_v2", images=IMAGE, video=True
)
derived(
    "skyreels_forced_v2v",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    "skyreels_v2",
    images=VIDEO,
    video=True,
    num_frames=9,
    overlap_history=1,
)
derived(
    "helios",
    "HeliosPipeline",
    "wan",
    helios,
    video=True,
    num_frames=9,
    num_latent_frames_per_chunk=3,
    history_sizes=[4, 2, 1],
)
derived(
    "helios_pyramid",
    "HeliosPyramidPipeline",
    "wan",
    pyramid,
    video=True,
    num_frames=9,
    num_latent_frames_per_chunk=3,
    history_sizes=[4, 2, 1],
    without=("num_inference_steps",),
    height=64,
    width=64,
    pyramid_num_inference_steps_list=[1, 1, 1],
)
derived("sana_i2v", "SanaImageToVideoPipeline", "sana_video", flow, images=IMAGE, video=True)
derived("ltx_condition", "LTXConditionPipeline", "ltx", flow, images=IMAGE, video=True)
derived(
    "ltx_long",
    "LTXI2VLongMultiPromptPipeline",
    "ltx",
    flow,
    images={"cond_image": {}},
    video=True,
    temporal_tile_size=16,
    temporal_overlap=8,
    decode_horizontal_tiles=1,
    decode_vertical_tiles=1,
)
derived(
    "ltx_upsample",
    "LTXLatentUpsamplePipeline",
    "ltx",
    upsampler,
    images={"video": [{}] * 9},
    video=True,
    without=("num_frames", "guidance_scale", "max_sequence_length", "num_inference_steps"),
)
derived(
    "cogvideox_control",
    "CogVideoXFunControlPipeline",
    "cogvideox",
    lambda given: {"transformer": changed(given["transformer"], in_channels=32)},
    images={"control_video": [{}] * 9},
    video=True,
    without=FRAMES,
)
derived(
    "sd_v2v",
    "VideoToVideoSDPipeline",
    "text_to_video_sd",
    images={"video": [{}] * 3},
    video=True,
    without=FRAMES,
    strength=0.7,
)
derived(
    "hunyuan_skyreels",
    "HunyuanSkyreelsImageToVideoPipeline",
    "hunyuan_video",
    lambda given: {"transformer": changed(given["transformer"], in_channels=8)},
    images=IMAGE,
    video=True,
)
derived(
    "kandinsky5_i2v",
    "Kandinsky5I2VPipeline",
    "kandinsky5_video",
    lambda given: {"transformer": changed(given["transformer"], in_visual_dim=4, visual_cond=True)},
    images=IMAGE,
    video=True,
    num_frames=21,
)
