"""The smallest pipelines that still are of their families, with weights that every machine fills with the same bits.

What `tests.pipelines` draws with `torch.randn` differs in its last bits from CPU to CPU, and with it a bundle's id.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from tests.pipelines import tokenizers
from tests.pipelines.registry import Family, seeded

TINY: dict[str, Family] = {}
DIM = 16  # width of every text encoder and denoiser
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
AXES = (2, 2, 4)  # how a head of 8 is divided among the axes of the rotary embedding


def tiny(name: str, *, images: Mapping[str, Any] | None = None, **call: Any):
    """Registers the decorated function, which returns a pipeline with whatever weights, under `name`."""

    def register(construct: Callable[[], Any]) -> Callable[[], Any]:
        def build() -> Any:
            with seeded(0):
                pipe = construct()
            fill(pipe)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        call_of = {"height": 64, "width": 64, "num_inference_steps": 2} | call
        TINY[name] = Family(name, build, call_of, images=images or {})
        return build

    return register


def fill(pipe: Any) -> None:
    """Gives every parameter of every component a value that is exact in binary.

    Raises:
        ValueError: a saved buffer has values that its class computed, which may differ from CPU to CPU.
    """
    rng = numpy.random.Generator(numpy.random.PCG64(7))
    for _, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            _fill(component.eval().requires_grad_(False), rng)


@torch.no_grad()
def _fill(module: torch.nn.Module, rng: numpy.random.Generator) -> None:
    parameters = dict(module.named_parameters())
    for name, value in module.state_dict(keep_vars=True).items():
        if name not in parameters and not isinstance(value, torch.nn.Parameter):
            raise ValueError(f"{type(module).__name__} saves the buffer {name}")
    for name, parameter in parameters.items():
        eighths = torch.from_numpy(rng.integers(-12, 13, tuple(parameter.shape)) / 8)
        fan_in = math.prod(parameter.shape[1:])
        if fan_in > 1:
            parameter.copy_(eighths / 2 ** round(math.log2(fan_in) / 2))
        else:
            parameter.copy_(eighths / 16 + (fan_in == 1 and name.endswith(("weight", "gamma"))))


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's, which knows no words but letters."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(char + "</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def _t5_tokenizer() -> Any:
    """T5's, which knows no words but letters."""
    letters = [char for char in string.printable if char.isprintable() and not char.isspace()]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0} | dict.fromkeys(letters, -6.0)
    return transformers.T5TokenizerFast(
        vocab=list(pieces.items()), extra_ids=0, additional_special_tokens=[], model_max_length=512
    )


def _clip(tokenizer: Any, *, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        projection_dim=DIM,
        intermediate_size=DIM,
        num_hidden_layers=2,  # SDXL takes the last but one
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def _t5(tokenizer: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=DIM,
        d_kv=8,
        d_ff=DIM,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5EncoderModel(config)


def _qwen25_vl(tokenizer: Any) -> Any:
    """Qwen 2.5 VL, with the vision tower that text-to-image never calls."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": DIM,
        "intermediate_size": DIM,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": True,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": DIM}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"patch_size": 4}, tie_word_embeddings=True
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _autoencoder(latent_channels: int = 4, **config: Any) -> Any:
    """Stable Diffusion's: four levels, so 8 pixels a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=latent_channels,
        sample_size=64,
        **config,
    )


@tiny(
    "pixart",
    guidance_scale=4.5,
    max_sequence_length=32,
    clean_caption=False,  # needs Beautiful Soup
    use_resolution_binning=False,  # it knows no size near 64 x 64
)
def pixart():
    tokenizer = _t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        vae=_autoencoder(scaling_factor=0.125),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            out_channels=8,
            num_layers=2,
            **HEADS,
            cross_attention_dim=DIM,
            caption_channels=DIM,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2),
    )


@tiny("flux", guidance_scale=3.5, max_sequence_length=32)
def flux():
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    return diffusers.FluxPipeline(
        vae=_autoencoder(scaling_factor=0.375, shift_factor=0.125),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_t5(tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            **HEADS,
            axes_dims_rope=AXES,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@tiny("sdxl_controlnet", images={"image": {}}, guidance_scale=5.0)
def sdxl_controlnet():
    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=(1, 2),
        cross_attention_dim=2 * DIM,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=DIM + 6 * 2,
    )
    return diffusers.StableDiffusionXLControlNetPipeline(
        vae=_autoencoder(scaling_factor=0.125),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer_2, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        controlnet=diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


@tiny("qwen_image", true_cfg_scale=4.0, negative_prompt=" ", max_sequence_length=32)
def qwen_image():
    tokenizer = tokenizers.qwen()
    return diffusers.QwenImagePipeline(
        vae=diffusers.AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=_qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            num_layers=2, **HEADS, axes_dims_rope=AXES, joint_attention_dim=DIM
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@tiny("longcat_image", enable_prompt_rewrite=False)
def longcat_image():
    tokenizer = tokenizers.qwen()
    return diffusers.LongCatImagePipeline(
        tokenizer=tokenizer,
        text_processor=tokenizer,  # the real one knows images, too
        text_encoder=_qwen25_vl(tokenizer),
        vae=_autoencoder(16, scaling_factor=0.375, shift_factor=0.125),
        transformer=diffusers.LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=2,
            **HEADS,
            axes_dims_rope=list(AXES),
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
