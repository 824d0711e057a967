"""Pipelines that start from an image, fill a part of one, or are guided by one."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from tests.coverage.calls.registry import CALLS, call
from tests.coverage.calls.variants import NO_CHECKER, SMALL, changed, components
from tests.pipelines import FAMILIES, vision

IMAGE, INPAINT, CONTROL = {"image": {}}, {"image": {}, "mask_image": {}}, {"control_image": {}}
UNMARKED = {"add_watermarker": False}


def given_to(kind: Any, name: str, **more: Any) -> Any:
    """A pipeline of this class with the components of one of the shared families, without an IP adapter's."""
    known = inspect.signature(kind).parameters
    return kind(**{key: part for key, part in components(name, **more).items() if key in known})


def sampled(name: str, **call_: Any) -> dict[str, Any]:
    """What a shared family's call is given, with these changes."""
    return FAMILIES[name].call | SMALL | call_


def controlnet(name: str) -> Any:
    """The ControlNet of a U-Net."""
    unet = components(name)["unet"]
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))


@call("sd_img2img", images=IMAGE, **sampled("sd", strength=0.6))
def stable_diffusion_img2img():
    return given_to(diffusers.StableDiffusionImg2ImgPipeline, "sd", **NO_CHECKER)


@call("sd_inpaint", images=INPAINT, **sampled("sd", strength=0.7))
def stable_diffusion_inpaint():
    return given_to(diffusers.StableDiffusionInpaintPipeline, "sd", **NO_CHECKER)


@call("sd_inpaint_9", images=INPAINT, **sampled("sd", strength=1.0))
def stable_diffusion_inpaint_9():
    unet = changed(components("sd")["unet"], in_channels=9)
    return given_to(diffusers.StableDiffusionInpaintPipeline, "sd", unet=unet, **NO_CHECKER)


@call("sd_controlnet", images=IMAGE, **sampled("sd", controlnet_conditioning_scale=0.7))
def stable_diffusion_controlnet():
    return given_to(diffusers.StableDiffusionControlNetPipeline, "sd", controlnet=controlnet("sd"), **NO_CHECKER)


@call("sd_controlnet_img2img", images=IMAGE | CONTROL, **sampled("sd", strength=0.6))
def stable_diffusion_controlnet_img2img():
    return given_to(diffusers.StableDiffusionControlNetImg2ImgPipeline, "sd", controlnet=controlnet("sd"), **NO_CHECKER)


@call("sdxl_img2img", images=IMAGE, **sampled("sdxl", strength=0.6, denoising_start=None))
def stable_diffusion_xl_img2img():
    return given_to(diffusers.StableDiffusionXLImg2ImgPipeline, "sdxl", **UNMARKED)


@call("sdxl_inpaint", images=INPAINT, **sampled("sdxl", strength=0.7))
def stable_diffusion_xl_inpaint():
    return given_to(diffusers.StableDiffusionXLInpaintPipeline, "sdxl", **UNMARKED)


@call("sdxl_controlnet", images=IMAGE, **sampled("sdxl"))
def stable_diffusion_xl_controlnet():
    return given_to(diffusers.StableDiffusionXLControlNetPipeline, "sdxl", controlnet=controlnet("sdxl"), **UNMARKED)


@call("sd3_img2img", images=IMAGE, **sampled("sd3", strength=0.7))
def stable_diffusion_3_img2img():
    return given_to(diffusers.StableDiffusion3Img2ImgPipeline, "sd3")


@call("sd3_inpaint", images=INPAINT, **sampled("sd3", strength=0.7))
def stable_diffusion_3_inpaint():
    return given_to(diffusers.StableDiffusion3InpaintPipeline, "sd3")


@call("sd3_controlnet", images=CONTROL, **sampled("sd3"))
def stable_diffusion_3_controlnet():
    controlnet = diffusers.SD3ControlNetModel.from_transformer(
        components("sd3")["transformer"], num_layers=1, num_extra_conditioning_channels=0
    )
    return given_to(diffusers.StableDiffusion3ControlNetPipeline, "sd3", controlnet=controlnet)


@call("flux_img2img", images=IMAGE, **sampled("flux", strength=0.7))
def flux_img2img():
    return given_to(diffusers.FluxImg2ImgPipeline, "flux")


@call("flux_inpaint", images=INPAINT, **sampled("flux", strength=0.7))
def flux_inpaint():
    return given_to(diffusers.FluxInpaintPipeline, "flux")


@call("flux_fill", images=INPAINT, **sampled("flux"))
def flux_fill():
    transformer = changed(components("flux")["transformer"], in_channels=384, out_channels=64)
    return given_to(diffusers.FluxFillPipeline, "flux", transformer=transformer)


@call("flux_control", images=CONTROL, **sampled("flux"))
def flux_control():
    transformer = changed(components("flux")["transformer"], in_channels=128, out_channels=64)
    return given_to(diffusers.FluxControlPipeline, "flux", transformer=transformer)


def flux_net() -> Any:
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    return diffusers.FluxControlNetModel.from_transformer(
        components("flux")["transformer"], num_layers=1, num_single_layers=1, **heads
    )


@call("flux_controlnet", images=CONTROL, **sampled("flux", controlnet_conditioning_scale=0.7))
def flux_controlnet():
    return given_to(diffusers.FluxControlNetPipeline, "flux", controlnet=flux_net())


@call("flux_kontext_image", images=IMAGE, **sampled("flux", _auto_resize=False))
def flux_kontext():
    return given_to(diffusers.FluxKontextPipeline, "flux")


@call("chroma_img2img", images=IMAGE, **sampled("chroma", strength=0.7))
def chroma_img2img():
    return given_to(diffusers.ChromaImg2ImgPipeline, "chroma")


@call("qwen_image_img2img", images=IMAGE, **sampled("qwen_image", strength=0.7))
def qwen_image_img2img():
    return given_to(diffusers.QwenImageImg2ImgPipeline, "qwen_image")


@call("qwen_image_inpaint", images=INPAINT, **sampled("qwen_image", strength=0.7))
def qwen_image_inpaint():
    return given_to(diffusers.QwenImageInpaintPipeline, "qwen_image")


@call("z_image_img2img", images=IMAGE, **sampled("z_image", strength=0.7))
def z_image_img2img():
    return given_to(diffusers.ZImageImg2ImgPipeline, "z_image")


@call("flux2_image", images={"image": [{}]}, **sampled("flux2"))
def flux2_image():
    return given_to(diffusers.Flux2Pipeline, "flux2")


@call("lcm_img2img", images=IMAGE, **sampled("sd", strength=0.6))
def latent_consistency_img2img():
    unet = changed(components("sd")["unet"], time_cond_proj_dim=16)
    scheduler = diffusers.LCMScheduler()
    return given_to(diffusers.LatentConsistencyModelImg2ImgPipeline, "sd", unet=unet, scheduler=scheduler, **NO_CHECKER)


@call("sd_pag_img2img", images=IMAGE, **sampled("sd", strength=0.6, pag_scale=2.0))
def stable_diffusion_pag_img2img():
    return given_to(diffusers.StableDiffusionPAGImg2ImgPipeline, "sd", pag_applied_layers="mid", **NO_CHECKER)


@call("sdxl_controlnet_img2img", images=IMAGE | CONTROL, **sampled("sdxl", strength=0.6))
def stable_diffusion_xl_controlnet_img2img():
    return given_to(
        diffusers.StableDiffusionXLControlNetImg2ImgPipeline, "sdxl", controlnet=controlnet("sdxl"), **UNMARKED
    )


@call("sdxl_controlnet_inpaint", images=INPAINT | CONTROL, **sampled("sdxl", strength=0.6))
def stable_diffusion_xl_controlnet_inpaint():
    return given_to(
        diffusers.StableDiffusionXLControlNetInpaintPipeline, "sdxl", controlnet=controlnet("sdxl"), **UNMARKED
    )


@call("flux_control_img2img", images=IMAGE | CONTROL, **sampled("flux", strength=0.7))
def flux_control_img2img():
    transformer = changed(components("flux")["transformer"], in_channels=128, out_channels=64)
    return given_to(diffusers.FluxControlImg2ImgPipeline, "flux", transformer=transformer)


@call("flux_controlnet_img2img", images=IMAGE | CONTROL, **sampled("flux", strength=0.7))
def flux_controlnet_img2img():
    return given_to(diffusers.FluxControlNetImg2ImgPipeline, "flux", controlnet=flux_net())


@call("flux_controlnet_inpaint", images=INPAINT | CONTROL, **sampled("flux", strength=0.7))
def flux_controlnet_inpaint():
    return given_to(diffusers.FluxControlNetInpaintPipeline, "flux", controlnet=flux_net())


@call("z_image_inpaint", images=INPAINT, **sampled("z_image", strength=0.7))
def z_image_inpaint():
    return given_to(diffusers.ZImageInpaintPipeline, "z_image")


@call("sana_sprint_img2img", images=IMAGE, **CALLS["sana_sprint"].call, strength=0.6)
def sana_sprint_img2img():
    given = CALLS["sana_sprint"].build().components
    return diffusers.SanaSprintImg2ImgPipeline(**given)


def qwen_edit(kind: Any) -> Any:
    """A pipeline of this class, whose text encoder sees the image."""
    tokenizer = vision.qwen_vl_tokenizer()
    model, processor = vision.qwen25_vl(tokenizer), vision.qwen_vl_processor(tokenizer)
    return given_to(kind, "qwen_image", tokenizer=tokenizer, text_encoder=model, processor=processor)


@call("qwen_image_edit", images=IMAGE, **sampled("qwen_image"))
def qwen_image_edit():
    return qwen_edit(diffusers.QwenImageEditPipeline)


@call("qwen_image_edit_inpaint", images=INPAINT, **sampled("qwen_image", strength=0.7))
def qwen_image_edit_inpaint():
    return qwen_edit(diffusers.QwenImageEditInpaintPipeline)


@call("qwen_image_edit_plus", images={"image": [{}, {"height": 48, "width": 96}]}, **sampled("qwen_image"))
def qwen_image_edit_plus():
    return qwen_edit(diffusers.QwenImageEditPlusPipeline)
