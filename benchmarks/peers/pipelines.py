"""Pipelines of 300 to 450 million parameters, from configuration, with seeded random weights.

They are large enough that arithmetic decides and small enough for a CPU. Vocabularies, autoencoders and CLIP have
their true sizes; the denoisers and T5 have fewer and narrower layers than the models that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "a small red fox in a green forest, morning light"
_CLIP_VOCABULARY, _T5_VOCABULARY, _UMT5_VOCABULARY = 49408, 32128, 64000


@dataclass(frozen=True)
class Mid:
    """A pipeline of middle size.

    Attributes:
        title: what a table calls it.
        make: builds the pipeline; its weights follow torch's seed.
        call: the keywords of its call, the prompt aside.
        passes: what the bundle compiles.
        denoiser: the component that runs at every step.
        text_encoders: the components that run once before the first step.
    """

    title: str
    make: Callable[[], Any]
    call: Mapping[str, Any]
    denoiser: str = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder",)

    @property
    def passes(self) -> list[dict[str, Any]]:
        """Everything compiled: the denoiser's blocks and what lies between, and the other components whole."""
        whole = [{"name": "compile", "component": name, "scope": "whole"} for name in (*self.text_encoders, "vae")]
        return [{"name": "compile", "component": self.denoiser, "between": True}, *whole]

    def whole(self, backend: str) -> list[dict[str, Any]]:
        """Every component compiled whole by one backend."""
        names = (*self.text_encoders, self.denoiser, "vae")
        return [{"name": "compile", "component": name, "backend": backend} for name in names]


def save(name: str, folder: Path) -> None:
    """Builds the pipeline with weights of seed 0 and saves it."""
    import torch

    torch.manual_seed(0)
    pipe = MID[name].make()
    pipe.save_pretrained(folder)


def parameters(folder: Path) -> dict[str, int]:
    """Returns the number of parameters of each component in a saved pipeline."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                counts[path.parent.name] = counts.get(path.parent.name, 0) + size
    return counts


def _clip() -> tuple[Any, Any]:
    """CLIP ViT-L/14's text model of the true size, and a small tokenizer within its vocabulary."""
    import transformers

    from tests.pipelines import tokenizers

    tokenizer = tokenizers.clip()
    config = transformers.CLIPTextConfig(
        vocab_size=_CLIP_VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.CLIPTextModel(config), tokenizer


def _t5(multilingual: bool = False) -> tuple[Any, Any]:
    """An encoder of six layers as wide as T5 small, and a small tokenizer within its vocabulary."""
    import transformers

    from tests.pipelines import tokenizers

    settings = {
        "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_heads": 8,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    if multilingual:
        config = transformers.UMT5Config(vocab_size=_UMT5_VOCABULARY, **settings)
        return transformers.UMT5EncoderModel(config), tokenizers.t5()
    config = transformers.T5Config(vocab_size=_T5_VOCABULARY, **settings)
    return transformers.T5EncoderModel(config), tokenizers.t5()


def _autoencoder(latent_channels: int, quant_conv: bool = True, **config: Any) -> Any:
    """Stable Diffusion's autoencoder of the true size: 84 million parameters, 49 of them the decoder's."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=256,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **config,
    )


def _stable_diffusion() -> Any:
    import diffusers

    text_encoder, tokenizer = _clip()
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(160, 320, 640, 640),
        attention_head_dim=8,  # the number of heads: the name is historical
        cross_attention_dim=768,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return diffusers.StableDiffusionPipeline(
        vae=_autoencoder(4, scaling_factor=0.18215),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**noise),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux() -> Any:
    import diffusers

    text_encoder, tokenizer = _clip()
    text_encoder_2, tokenizer_2 = _t5()
    return diffusers.FluxPipeline(
        vae=_autoencoder(16, quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            num_layers=8,
            num_single_layers=13,
            num_attention_heads=12,
            attention_head_dim=64,
            axes_dims_rope=(8, 28, 28),
            joint_attention_dim=512,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _pixart() -> Any:
    import diffusers

    text_encoder, tokenizer = _t5()
    return diffusers.PixArtSigmaPipeline(
        vae=_autoencoder(4, scaling_factor=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=32,
            out_channels=8,
            num_layers=14,
            num_attention_heads=16,
            attention_head_dim=72,
            cross_attention_dim=1152,
            caption_channels=512,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=2),
    )


def _wan() -> Any:
    import diffusers

    text_encoder, tokenizer = _t5(multilingual=True)
    return diffusers.WanPipeline(
        vae=diffusers.AutoencoderKLWan(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.WanTransformer3DModel(
            num_layers=12, num_attention_heads=8, attention_head_dim=128, text_dim=512, freq_dim=256, ffn_dim=4096
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


_IMAGE = {"height": 256, "width": 256, "num_inference_steps": 6}
MID: Mapping[str, Mid] = {
    "sd": Mid("Stable Diffusion", _stable_diffusion, _IMAGE | {"guidance_scale": 7.5}, denoiser="unet"),
    "flux": Mid(
        "FLUX",
        _flux,
        _IMAGE | {"guidance_scale": 3.5, "max_sequence_length": 128},
        text_encoders=("text_encoder", "text_encoder_2"),
    ),
    "pixart": Mid("PixArt-like DiT", _pixart, _IMAGE | {"guidance_scale": 4.5, "use_resolution_binning": False}),
    "wan": Mid(
        "Wan-like video DiT",
        _wan,
        {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 6, "guidance_scale": 5.0},
    ),
}
