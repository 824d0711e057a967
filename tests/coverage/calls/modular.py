"""Modular pipelines, of the components of ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from tests.coverage.calls.derived import Parts
from tests.coverage.calls.image_inputs import IMAGE
from tests.coverage.calls.newer_images import qwen3_vl
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
        names = pipe.pretrained_component_names
        known = {key: part for key, part in given.items() if key in names and part is not None}
        pipe.update_components(**known, **(settings or {}))
        return pipe


CLIP = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 32}

PLAIN = {"height": 32, "width": 48, "num_frames": 5, "add_resolution_template": False, "add_duration_template": False}
UNGUARDED = {"enable_safety_checker": False}
CHUNKS = {"num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
PYRAMID = {"height": 64, "width": 64, "num_frames": 9, "pyramid_num_inference_steps_list": [1, 1, 1], **CHUNKS}
PYRAMID |= {"steps": None, "max_sequence_length": 32}


def second(given: dict[str, Any]) -> dict[str, Any]:
    """The same transformer once more, for the low noise of a second expert."""
    return {"transformer_2": changed(given["transformer"])}


def unenhanced(_given: dict[str, Any]) -> dict[str, Any]:
    """Without the language model that writes prompts anew."""
    return {"pe": None, "pe_tokenizer": None}


def layered(given: dict[str, Any]) -> dict[str, Any]:
    """With as many layers in the text encoder as its blocks read, and as many of their states in the denoiser."""
    seen = qwen3_vl(bare=True, layers=36)
    return seen | {"transformer": changed(given["transformer"], num_text_layers=12)}


def euler(_given: dict[str, Any]) -> dict[str, Any]:
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


modular("flux_modular", "FluxModularPipeline", "flux", **SMALL, max_sequence_length=32)
modular("flux_modular_img2img", "FluxModularPipeline", "flux", images=IMAGE, **SMALL, strength=0.6)
modular("flux_kontext_modular", "FluxKontextModularPipeline", "flux", **SMALL, max_sequence_length=32)
modular("flux2_modular", "Flux2ModularPipeline", "flux2", **SMALL, text_encoder_out_layers=(1, 2, 3))
KLEIN = {**SMALL, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
modular("flux2_klein_modular", "Flux2KleinModularPipeline", "flux2_klein", **KLEIN)
modular("flux2_klein_base_modular", "Flux2KleinBaseModularPipeline", "flux2_klein", **KLEIN)
modular("sdxl_modular", "StableDiffusionXLModularPipeline", "sdxl", **SMALL)
modular("sd3_modular", "StableDiffusion3ModularPipeline", "sd3", **SMALL, max_sequence_length=32)
modular("z_image_modular", "ZImageModularPipeline", "z_image", **SMALL, max_sequence_length=64)
modular("qwen_image_modular", "QwenImageModularPipeline", "qwen_image", **SMALL, max_sequence_length=64)
LTX = {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 32}
modular("ltx_modular", "LTXModularPipeline", "ltx", **LTX, video=True)
modular("ltx2_modular", "LTX2ModularPipeline", "ltx2", height=64, width=64, num_frames=9, video=True)
modular("wan_modular", "WanModularPipeline", "wan", **CLIP, video=True)
modular("wan22_modular", "Wan22ModularPipeline", "wan", second, **CLIP, video=True)
modular("wan_i2v_modular", "WanImage2VideoModularPipeline", "wan_i2v_encoder", images=IMAGE, **CLIP, video=True)
modular("wan22_i2v_modular", "Wan22Image2VideoModularPipeline", "wan_i2v", second, images=IMAGE, **CLIP, video=True)
modular("wan_vace_modular", "Wan22VaceModularPipeline", "wan_vace", second, **CLIP, video=True)
modular("krea2_modular", "Krea2ModularPipeline", "krea2", layered, **SMALL, max_sequence_length=32)
modular("krea2_turbo_modular", "Krea2TurboModularPipeline", "krea2", layered, **SMALL, max_sequence_length=32)
SCHEDULE = {"guidance_schedule": [4.0, 4.0, 4.0], "max_sequence_length": 256}
modular("ideogram4_modular", "Ideogram4ModularPipeline", "ideogram4", **SMALL, **SCHEDULE)
modular("ernie_image_modular", "ErnieImageModularPipeline", "ernie_image", unenhanced, **SMALL)
FRAMES = {"height": 64, "width": 64, "num_frames": 5}
modular("hunyuan15_modular", "HunyuanVideo15ModularPipeline", "hunyuan15", **FRAMES, video=True)
modular(
    "qwen_image21_modular",
    "QwenImage21ModularPipeline",
    "qwen_image21",
    **SMALL,
    output_resolution=64,
    use_kv_cache=False,
)
modular(
    "qwen_image21_turbo_modular",
    "QwenImage21TurboModularPipeline",
    "qwen_image21",
    **SMALL,
    output_resolution=64,
    use_kv_cache=False,
)
modular("cosmos3_modular", "Cosmos3OmniModularPipeline", "cosmos3", settings=UNGUARDED, **PLAIN, video=True)
modular(
    "cosmos3_distilled_modular",
    "Cosmos3DistilledModularPipeline",
    "cosmos3",
    euler,
    settings=UNGUARDED | {"distilled_sigmas": [1.0, 0.6, 0.3]},
    **PLAIN,
    video=True,
)
modular("helios_modular", "HeliosModularPipeline", "helios", **CLIP, **CHUNKS, video=True)
modular("helios_pyramid_modular", "HeliosPyramidModularPipeline", "helios_pyramid", **PYRAMID, video=True)
modular("qwen_image_edit_modular", "QwenImageEditModularPipeline", "qwen_image_edit", images=IMAGE, **SMALL)
modular(
    "qwen_image_edit_plus_modular", "QwenImageEditPlusModularPipeline", "qwen_image_edit_plus", images=IMAGE, **SMALL
)
modular("qwen_image_layered_modular", "QwenImageLayeredModularPipeline", "qwen_image_layered", images=IMAGE)
