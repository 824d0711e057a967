"""Modular pipelines, of the components of ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from tests.coverage.calls.derived import Parts
from tests.coverage.calls.registry import CALLS, call
from tests.coverage.calls.variants import SMALL, changed


def modular(
    name: str,
    kind: str,
    base: str,
    parts: Parts | None = None,
    *,
    images: Mapping[str, Any] | None = None,
    steps: int | None = 3,
    settings: Mapping[str, Any] | None = None,
    video: bool = False,
    gives: str = "image",
    **call_: Any,
) -> None:
    """Register a modular pipeline of class `kind` under `name`: its arguments are those of `derived`."""

    @call(name, images=images, video=video, steps=steps, gives=gives, **call_)
    def build() -> Any:
        given = CALLS[base].build().components
        given |= parts(given) if parts else {}
        pipe = getattr(diffusers, kind)()
        known = {
            key: part for key, part in given.items() if key in pipe.pretrained_component_names and part is not None
        }
        pipe.update_components(**known, **(settings or {}))
        return pipe


CLIP = {"height": 32, "width": 48, "num_frames": 5}

CHUNKS = {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
PYRAMID = {"height": 64, "width": 64, "num_frames": 9, "pyramid_num_inference_steps_list": [1, 1, 1], **CHUNKS}
PYRAMID |= {"steps": None, "max_sequence_length": 32}


def second(given: dict[str, Any]) -> dict[str, Any]:
    """The same transformer once more, for the low noise of a second expert."""
    return {"transformer_2": changed(given["transformer"])}


def distilled(given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.HeliosDMDScheduler.from_config(given["scheduler"].config)}


def euler(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


modular("flux_modular", "FluxModularPipeline", "flux", **SMALL, max_sequence_length=32)
modular("sdxl_modular", "StableDiffusionXLModularPipeline", "sdxl", **SMALL)
modular("flux_modular_img2img", "FluxModularPipeline", "flux", images={"image": {}}, **SMALL, strength=0.6)
modular("flux_kontext_modular", "FluxKontextModularPipeline", "flux", **SMALL, max_sequence_length=32)
modular("flux2_modular", "Flux2ModularPipeline", "flux2", **SMALL, text_encoder_out_layers=(1, 2, 3))
KLEIN = {**SMALL, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
modular("flux2_klein_modular", "Flux2KleinModularPipeline", "flux2_klein", **KLEIN)
modular("flux2_klein_base_modular", "Flux2KleinBaseModularPipeline", "flux2_klein", **KLEIN)
modular("sd3_modular", "StableDiffusion3ModularPipeline", "sd3", **SMALL, max_sequence_length=32)
modular("z_image_modular", "ZImageModularPipeline", "z_image", **SMALL, max_sequence_length=64)
modular("qwen_image_modular", "QwenImageModularPipeline", "qwen_image", **SMALL, max_sequence_length=64)
modular(
    "ltx_modular", "LTXModularPipeline", "ltx", height=64, width=96, num_frames=9, max_sequence_length=32, video=True
)
modular("wan_modular", "WanModularPipeline", "wan", **CLIP, max_sequence_length=32, video=True)
modular("wan22_modular", "Wan22ModularPipeline", "wan", second, **CLIP, max_sequence_length=32, video=True)
modular("krea2_modular", "Krea2ModularPipeline", "krea2", **SMALL, max_sequence_length=32)
modular("krea2_turbo_modular", "Krea2TurboModularPipeline", "krea2", **SMALL, max_sequence_length=32)
modular("ideogram4_modular", "Ideogram4ModularPipeline", "ideogram4", **SMALL, max_sequence_length=256)
modular("ernie_image_modular", "ErnieImageModularPipeline", "ernie_image", **SMALL)
modular(
    "hunyuan15_modular", "HunyuanVideo15ModularPipeline", "hunyuan15", height=64, width=64, num_frames=5, video=True
)
modular("qwen_image21_modular", "QwenImage21ModularPipeline", "qwen_image21", **SMALL, output_resolution=64)
modular("qwen_image21_turbo_modular", "QwenImage21TurboModularPipeline", "qwen_image21", **SMALL, output_resolution=64)
modular(
    "wan_i2v_modular",
    "WanImage2VideoModularPipeline",
    "wan_i2v_encoder",
    images={"image": {}},
    **CLIP,
    max_sequence_length=32,
    video=True,
)
modular(
    "wan22_i2v_modular",
    "Wan22Image2VideoModularPipeline",
    "wan_i2v",
    second,
    images={"image": {}},
    **CLIP,
    max_sequence_length=32,
    video=True,
)
modular("wan_vace_modular", "Wan22VaceModularPipeline", "wan_vace", second, **CLIP, max_sequence_length=32, video=True)
modular(
    "cosmos3_modular",
    "Cosmos3OmniModularPipeline",
    "cosmos3",
    settings={"enable_safety_checker": False},
    **CLIP,
    add_resolution_template=False,
    add_duration_template=False,
    video=True,
)
modular(
    "cosmos3_distilled_modular",
    "Cosmos3DistilledModularPipeline",
    "cosmos3",
    euler,
    settings={"enable_safety_checker": False, "distilled_sigmas": [1.0, 0.6, 0.3]},
    **CLIP,
    add_resolution_template=False,
    add_duration_template=False,
    video=True,
)
modular("helios_modular", "HeliosModularPipeline", "helios", **CLIP, **CHUNKS, max_sequence_length=32, video=True)
modular("helios_pyramid_modular", "HeliosPyramidModularPipeline", "helios_pyramid", **PYRAMID, video=True)
modular(
    "helios_pyramid_distilled_modular",
    "HeliosPyramidDistilledModularPipeline",
    "helios_pyramid",
    distilled,
    **PYRAMID,
    video=True,
)
modular("ltx2_modular", "LTX2ModularPipeline", "ltx2", height=64, width=64, num_frames=9, video=True)
modular("qwen_image_edit_modular", "QwenImageEditModularPipeline", "qwen_image_edit", images={"image": {}}, **SMALL)
modular(
    "qwen_image_edit_plus_modular",
    "QwenImageEditPlusModularPipeline",
    "qwen_image_edit_plus",
    images={"image": {}},
    **SMALL,
)
modular(
    "qwen_image_layered_modular", "QwenImageLayeredModularPipeline", "qwen_image_layered", images={"image": {}}, **SMALL
)
