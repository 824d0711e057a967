"""Wan and its kin: the text encoder's result is cut to the prompt and padded with zeros."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from diffkiln.families import Family
from diffkiln.models.known_parts import T5_XXL, Architecture, Config, Part, t5_tokenizer
from diffkiln.record.patches import Patch


def _get_t5_prompt_embeds(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes zeros where diffusers cuts and pads with zeros: the same bits."""
    clean = inspect.unwrap(original).__globals__["prompt_clean"]

    def get_t5_prompt_embeds(
        self: Any,
        prompt: Any = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: Any = None,
        dtype: Any = None,
    ) -> torch.Tensor:
        prompts = [clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        device = device or self._execution_device
        embeds = _encoded(self.text_encoder, self.tokenizer, prompts, max_sequence_length, device, dtype)
        embeds = embeds.repeat(1, num_videos_per_prompt, 1)
        return embeds.view(len(prompts) * num_videos_per_prompt, max_sequence_length, -1)

    return get_t5_prompt_embeds


def _of_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same for the blocks of modular pipelines, some of which take a prompt as it is."""
    clean = inspect.unwrap(original).__globals__.get("prompt_clean", str)

    def get_t5_prompt_embeds(
        text_encoder: Any, tokenizer: Any, prompt: Any, max_sequence_length: int, device: Any
    ) -> torch.Tensor:
        prompts = [clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        return _encoded(text_encoder, tokenizer, prompts, max_sequence_length, device)

    return get_t5_prompt_embeds


def _with_masks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same for Helios, which gives the masks, too, and has no use for them."""
    clean = inspect.unwrap(original).__globals__["prompt_clean"]

    def get_t5_prompt_embeds(
        text_encoder: Any, tokenizer: Any, prompt: Any, max_sequence_length: int, device: Any, dtype: Any = None
    ) -> tuple[torch.Tensor, None]:
        prompts = [clean(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        return _encoded(text_encoder, tokenizer, prompts, max_sequence_length, device, dtype), None

    return get_t5_prompt_embeds


def _helios(original: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same for the pipelines of Helios."""
    embeds = _get_t5_prompt_embeds(original)
    return lambda *args, **kwargs: (embeds(*args, **kwargs), None)


def _encoded(
    text_encoder: Any, tokenizer: Any, prompts: list[str], length: int, device: Any, dtype: Any = None
) -> torch.Tensor:
    """Returns [prompts, length, width], with zeros behind each prompt."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    embeds = text_encoder(tokens.input_ids, mask).last_hidden_state
    embeds = embeds.to(dtype=dtype or text_encoder.dtype, device=device)
    lengths = mask.gt(0).sum(dim=1, keepdim=True)
    within = torch.arange(length, device=lengths.device) < lengths
    return embeds.masked_fill(~within.unsqueeze(-1).to(embeds.device), 0.0)


_UMT5_XXL: Config = {**T5_XXL, "model_type": "umt5", "vocab_size": 256384}


def _wan(transformer: Config, *, experts: int = 1, **settings: Any) -> Architecture:
    """Returns Wan 2.x, text to video. 2.2 has two experts, one for the early steps and one for the late."""
    denoiser = Part("diffusers", "WanTransformer3DModel", transformer)
    names = ["transformer", "transformer_2"][:experts]
    return Architecture(
        "WanPipeline",
        "bfloat16",
        {
            "scheduler": Part(
                "diffusers",
                "UniPCMultistepScheduler",
                {
                    "num_train_timesteps": 1000,
                    "prediction_type": "flow_prediction",
                    "use_flow_sigmas": True,
                    "flow_shift": 3.0,
                },
            ),
            "text_encoder": Part("transformers", "UMT5EncoderModel", _UMT5_XXL),
            "tokenizer": t5_tokenizer(extra_ids=300),
            **dict.fromkeys(names, denoiser),
            "vae": Part("diffusers", "AutoencoderKLWan", {"base_dim": 96, "z_dim": 16}),
        },
        settings,
    )


_WAN_14B: Config = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
_WAN_1_3B: Config = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}

PLUGIN = Family(
    patches=(
        Patch(
            {"_get_t5_prompt_embeds": "6aceaece50aeec7c ecd9d18eb4da28fa"},
            _get_t5_prompt_embeds,
            known_in=(
                "WanPipeline WanVACEPipeline WanVideoToVideoPipeline WanImageToVideoPipeline "
                "SkyReelsV2Pipeline SkyReelsV2DiffusionForcingPipeline "
                "SkyReelsV2DiffusionForcingImageToVideoPipeline "
                "SkyReelsV2DiffusionForcingVideoToVideoPipeline SkyReelsV2ImageToVideoPipeline "
                "AnyFlowPipeline AnyFlowFARPipeline LucyEditPipeline"
            ),
            around=True,
        ),
        Patch(
            {"get_t5_prompt_embeds": "c3ce44cd48c01a34 a69b2be22747e4ba"},
            _of_blocks,
            known_in="WanTextEncoderStep WanAnimate2TextEncoderStep",
            function=True,
            around=True,
        ),
        Patch(
            {"get_t5_prompt_embeds": "6789d47509d8a958"},
            _with_masks,
            known_in="HeliosTextEncoderStep",
            function=True,
            around=True,
        ),
        Patch(
            {"_get_t5_prompt_embeds": "dbffb2c63a161a13"},
            _helios,
            known_in="HeliosPipeline HeliosPyramidPipeline",
            around=True,
        ),
    ),
    architectures={
        "wan2.1-t2v-1.3b": _wan(_WAN_1_3B),
        "wan2.1-t2v-14b": _wan(_WAN_14B),
        "wan2.2-t2v-a14b": _wan(_WAN_14B, experts=2, boundary_ratio=0.875),
    },
)
