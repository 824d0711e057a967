"""Image pipelines whose denoiser is a transformer, called in further ways."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

from tests.coverage.calls.derived import assembled, derived
from tests.coverage.calls.image_inputs import CONTROL, IMAGE, INPAINT
from tests.coverage.calls.parts import siglip_encoder, siglip_processor
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import changed, components
from tests.pipelines import tokenizers, vision
from tests.pipelines.parts import DIM

MASKED = {"control_image": {}, "control_mask": {}}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def wider(channels: int, **settings: Any):
    """The same, with a denoiser that takes so many channels."""
    return lambda given: {"transformer": changed(given["transformer"], in_channels=channels, **settings)}


def sd3_net(extra: int):
    def parts(given: dict[str, Any]) -> dict[str, Any]:
        model = changed(given["transformer"])  # a copy, whose configuration diffusers changes
        net = diffusers.SD3ControlNetModel.from_transformer(model, num_layers=1, num_extra_conditioning_channels=extra)
        return {"controlnet": net}

    return parts


def redux(_given: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_encoder": siglip_encoder(),
        "feature_extractor": siglip_processor(),
        "image_embedder": ReduxImageEncoder(redux_dim=DIM, txt_in_features=DIM),
    }


def hunyuan_net(given: dict[str, Any]) -> dict[str, Any]:
    names = ("in_channels", "patch_size", "hidden_size", "num_attention_heads", "attention_head_dim", "sample_size")
    names += ("cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim")
    config = given["transformer"].config
    net = diffusers.HunyuanDiT2DControlNetModel(transformer_num_layers=4, **{key: config[key] for key in names})
    return {"controlnet": net}


def qwen_net(extra: int):
    def parts(given: dict[str, Any]) -> dict[str, Any]:
        settings = {"num_layers": 1, "joint_attention_dim": DIM, "axes_dims_rope": (4, 6, 6)}
        return {"controlnet": diffusers.QwenImageControlNetModel(**settings, **HEADS, extra_condition_channels=extra)}

    return parts


def sana_net(given: dict[str, Any]) -> dict[str, Any]:
    names = ("in_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads")
    names += ("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "sample_size")
    config = given["transformer"].config
    net = diffusers.SanaControlNetModel(num_layers=1, out_channels=8, **{key: config[key] for key in names})
    return {"controlnet": net}


def z_net(channels: int):
    def parts(_given: dict[str, Any]) -> dict[str, Any]:
        net = diffusers.ZImageControlNetModel(
            control_layers_places=[0], control_in_dim=channels, dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2
        )
        return {"controlnet": net}

    return parts


def sighted(_given: dict[str, Any]) -> dict[str, Any]:
    """A text encoder that sees images, and its processor."""
    tokenizer = vision.qwen_vl_tokenizer()
    processor = vision.qwen_vl_processor(tokenizer)
    return {"tokenizer": tokenizer, "text_processor": processor, "text_encoder": vision.qwen25_vl(tokenizer)}


derived("sd3_controlnet_inpaint", "StableDiffusion3ControlNetInpaintingPipeline", "sd3", sd3_net(1), images=MASKED)
derived(
    "sd3_pag_img2img",
    "StableDiffusion3PAGImg2ImgPipeline",
    "sd3",
    images=IMAGE,
    settings={"pag_applied_layers": "blocks.1"},
    pag_scale=2.0,
    strength=0.7,
)
derived(
    "flux_control_inpaint",
    "FluxControlInpaintPipeline",
    "flux",
    wider(128, out_channels=64),
    images=INPAINT | CONTROL,
    strength=0.7,
)
derived("flux_kontext_inpaint", "FluxKontextInpaintPipeline", "flux", images=INPAINT, _auto_resize=False)
derived(
    "flux_redux",
    "FluxPriorReduxPipeline",
    "flux",
    redux,
    gives="an embedding",
    images=IMAGE,
    without=("num_inference_steps", "guidance_scale", "max_sequence_length"),
)
derived(
    "visual_cloze",
    "VisualClozeGenerationPipeline",
    "flux",
    wider(384, out_channels=64),
    settings={"resolution": 64},
    images={"image": [[{}, {}], [{}, None]]},
    without=("height", "width"),
    task_prompt="a drawing of {}",
    content_prompt="{}",
)
derived(
    "visual_cloze_combined",
    "VisualClozePipeline",
    "visual_cloze",
    images={"image": [[{}, {}], [{}, None]]},
    upsampling_height=64,
    upsampling_width=64,
    upsampling_strength=0.7,
    settings={"resolution": 64},
)
derived("flux2_klein_inpaint", "Flux2KleinInpaintPipeline", "flux2_klein", images=INPAINT, strength=0.7)
derived("cogview4_control", "CogView4ControlPipeline", "cogview4", wider(8, out_channels=4), images=CONTROL)
derived("hunyuan_dit_controlnet", "HunyuanDiTControlNetPipeline", "hunyuan_dit", hunyuan_net, images=CONTROL)
derived("qwen_image_controlnet", "QwenImageControlNetPipeline", "qwen_image", qwen_net(0), images=CONTROL)
derived("qwen_image_controlnet_inpaint", "QwenImageControlNetInpaintPipeline", "qwen_image", qwen_net(4), images=MASKED)
derived("qwen_image_layered", "QwenImageLayeredPipeline", "qwen_image_edit", images=IMAGE, layers=2, resolution=640)
derived("sana_controlnet", "SanaControlNetPipeline", "sana", sana_net, images=CONTROL)
derived("z_image_controlnet", "ZImageControlNetPipeline", "z_image", z_net(16), images=CONTROL)
derived("z_image_controlnet_inpaint", "ZImageControlNetInpaintPipeline", "z_image", z_net(33), images=INPAINT | CONTROL)
derived("kandinsky3_img2img", "Kandinsky3Img2ImgPipeline", "kandinsky3", images=IMAGE, strength=0.7)
derived(
    "bria_fibo_edit",
    "BriaFiboEditPipeline",
    "bria_fibo",
    images=IMAGE,
    prompt='{"edit_instruction": "{}"}',
    _auto_resize=False,
)
derived(
    "longcat_image_edit",
    "LongCatImageEditPipeline",
    "longcat_image",
    sighted,
    images=IMAGE,
    without=("enable_prompt_rewrite",),
)


@call("kolors", height=64, width=64, guidance_scale=5.0, max_sequence_length=32)
def kolors():
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel  # which warns of torch.jit

    given = components("sdxl")
    tokenizer = tokenizers.chat_glm()
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(tokenizer),
        hidden_size=DIM,
        ffn_hidden_size=48,
        kv_channels=16,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        apply_query_key_layer_scaling=False,
        original_rope=True,
    )
    unet = changed(
        given["unet"],
        cross_attention_dim=24,
        encoder_hid_dim=DIM,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=DIM + 6 * 8,
    )
    own = {"tokenizer": tokenizer, "text_encoder": ChatGLMModel(config), "unet": unet, "vae": given["vae"]}
    return assembled("KolorsPipeline", own | {"scheduler": given["scheduler"]})


derived("kolors_img2img", "KolorsImg2ImgPipeline", "kolors", images=IMAGE, strength=0.7)
derived("kolors_pag", "KolorsPAGPipeline", "kolors", settings={"pag_applied_layers": "mid"}, pag_scale=2.0)
