"""Pipelines that call the components of another in another way."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.coverage.calls.registry import call
from tests.pipelines import FAMILIES, parts
from tests.pipelines.unet_families import NOISE_SCHEDULE

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SMALL = {"height": 64, "width": 64}
INSTRUCTION = FAMILIES["sana"].call["complex_human_instruction"]


def components(name: str, **changed: Any) -> dict[str, Any]:
    """The components of one of the shared families."""
    return FAMILIES[name].build().components | changed


def changed(model: Any, **settings: Any) -> Any:
    """A model of the same configuration but for these settings."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model)(**config | settings)


@call("sd_pag", **SMALL, pag_scale=2.0)
def stable_diffusion_pag():
    given = components("sd", **NO_CHECKER)
    return diffusers.StableDiffusionPAGPipeline(**given, pag_applied_layers="mid")


@call("sdxl_pag", **SMALL, pag_scale=2.0)
def stable_diffusion_xl_pag():
    return diffusers.StableDiffusionXLPAGPipeline(**components("sdxl"), pag_applied_layers="mid", add_watermarker=False)


@call("sd3_pag", **SMALL, pag_scale=2.0, max_sequence_length=32)
def stable_diffusion_3_pag():
    given = components("sd3")
    given = {key: value for key, value in given.items() if key not in ("image_encoder", "feature_extractor")}
    return diffusers.StableDiffusion3PAGPipeline(**given, pag_applied_layers="blocks.1")


@call(
    "pixart_sigma_pag",
    **SMALL,
    pag_scale=2.0,
    max_sequence_length=32,
    clean_caption=False,
    use_resolution_binning=False,
)
def pixart_sigma_pag():
    return diffusers.PixArtSigmaPAGPipeline(**components("pixart_sigma"), pag_applied_layers="blocks.1")


@call(
    "sana_pag",
    **SMALL,
    pag_scale=2.0,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=INSTRUCTION,
)
def sana_pag():
    return diffusers.SanaPAGPipeline(**components("sana"), pag_applied_layers="transformer_blocks.0")


@call("hunyuan_dit_pag", **SMALL, pag_scale=2.0, use_resolution_binning=False)
def hunyuan_dit_pag():
    given = components("hunyuan_dit", **NO_CHECKER)
    return diffusers.HunyuanDiTPAGPipeline(**given, pag_applied_layers="blocks.1")


@call("pixart_alpha", **SMALL, max_sequence_length=32, clean_caption=False, use_resolution_binning=False)
def pixart_alpha():
    return diffusers.PixArtAlphaPipeline(**components("pixart_sigma"))


@call("lcm", **SMALL, guidance_scale=8.0)
def latent_consistency():
    given = components("sd", scheduler=diffusers.LCMScheduler(**NOISE_SCHEDULE), **NO_CHECKER)
    given["unet"] = changed(given["unet"], time_cond_proj_dim=32)
    return diffusers.LatentConsistencyModelPipeline(**given)


@call(
    "sana_sprint",
    **SMALL,
    num_inference_steps=2,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=INSTRUCTION,
)
def sana_sprint():
    given = components("sana", scheduler=diffusers.SCMScheduler())
    given["transformer"] = changed(given["transformer"], guidance_embeds=True)
    return diffusers.SanaSprintPipeline(**given)


@call("flux_kontext", **SMALL, max_sequence_length=32, max_area=64 * 64, _auto_resize=False)
def flux_kontext():
    return diffusers.FluxKontextPipeline(**components("flux"))


@call("flux2_klein_kv", **SMALL, max_sequence_length=64, text_encoder_out_layers=(1, 2, 3))
def flux2_klein_kv():
    return diffusers.Flux2KleinKVPipeline(**components("flux2_klein"))


@call("animate_diff", video=True, **SMALL, num_frames=3, decode_chunk_size=2)
def animate_diff():
    given = components("sd", feature_extractor=None, motion_adapter=motion_adapter())
    given["scheduler"] = diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False)
    return diffusers.AnimateDiffPipeline(**{key: value for key, value in given.items() if key != "safety_checker"})


@call("animate_diff_pag", video=True, **SMALL, num_frames=3, pag_scale=2.0)
def animate_diff_pag():
    given = components("sd", feature_extractor=None, motion_adapter=motion_adapter())
    given["scheduler"] = diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False)
    del given["safety_checker"]
    return diffusers.AnimateDiffPAGPipeline(**given, pag_applied_layers="mid")


@call("animate_diff_sdxl", video=True, **SMALL, num_frames=3)
def animate_diff_xl():
    given = components("sdxl", motion_adapter=motion_adapter())
    given["scheduler"] = diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False)
    return diffusers.AnimateDiffSDXLPipeline(**given)


def motion_adapter():
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8
    )


@call("skyreels_v2", video=True, height=32, width=48, num_frames=5, max_sequence_length=32)
def skyreels_v2():
    given = components("wan", transformer=diffusers.SkyReelsV2Transformer3DModel(**WAN))
    return diffusers.SkyReelsV2Pipeline(**taken(given, "vae", "text_encoder", "tokenizer", "transformer", "scheduler"))


@call("anyflow", video=True, height=32, width=48, num_frames=5, max_sequence_length=32)
def any_flow():
    given = components(
        "wan",
        transformer=diffusers.AnyFlowTransformer3DModel(**WAN),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )
    return diffusers.AnyFlowPipeline(**taken(given, "vae", "text_encoder", "tokenizer", "transformer", "scheduler"))


@call("wan_vace", video=True, height=32, width=48, num_frames=5, max_sequence_length=32)
def wan_vace():
    transformer = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=96)
    given = components("wan", transformer=transformer)
    return diffusers.WanVACEPipeline(**taken(given, "vae", "text_encoder", "tokenizer", "transformer", "scheduler"))


WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": parts.DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "rope_max_seq_len": 32,
}


def taken(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names}
