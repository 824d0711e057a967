"""What configurations of known models are made of: shapes and settings as publishers give them, no weights.

Whole ones are in the families (diffkiln.families). Values that equal the default of the class are left out where the
class has one made for that very model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from diffkiln.models import stand_ins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = dict[str, Any]


class Part(NamedTuple):
    """One component: library, class and configuration, which is that of its stand-in if there is a `stand_in`.

    The latter makes what stands in for a tokenizer, whose tokens no configuration gives.
    """

    library: str
    kind: str
    config: Config
    stand_in: Callable[..., PreTrainedTokenizerBase] | None = None


class Architecture(NamedTuple):
    """A pipeline: its class, the type its weights are published in, its components and its own settings."""

    pipeline: str
    dtype: str
    parts: dict[str, Part]
    settings: Config


def _clip_config(model_type: str, width: int, layers: int, heads: int, act: str) -> Config:
    return {
        "model_type": model_type,
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": act,
        "layer_norm_eps": 1e-05,
        # Not the tokenizer's ids, but what was published: with 2, the end of the text is where the id is largest.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


CLIP_L = _clip_config("clip_text_model", 768, 12, 12, "quick_gelu")
CLIP_G = _clip_config("clip_text_model", 1280, 32, 20, "gelu")
T5_XXL: Config = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def clip(config: Config, *, projection: bool = False) -> Part:
    """Returns a text encoder of CLIP."""
    return Part("transformers", "CLIPTextModelWithProjection" if projection else "CLIPTextModel", config)


def clip_tokenizer(pad: str = "<|endoftext|>") -> Part:
    """Returns the tokenizer of CLIP; `pad` is its token for padding."""
    config = {"pad_token": pad, "model_max_length": 77}
    return Part("transformers", "CLIPTokenizer", config, stand_ins.clip_tokenizer)


def t5_tokenizer(extra_ids: int = 100) -> Part:
    """Returns the tokenizer of T5, with so many tokens more than texts need."""
    config = {"extra_ids": extra_ids, "model_max_length": 512}
    return Part("transformers", "T5Tokenizer", config, stand_ins.t5_tokenizer)


def autoencoder(channels: int, sample_size: int, *, quant_conv: bool = True, **config: Any) -> Part:
    """Returns the autoencoder that Stable Diffusion has, and many others with it."""
    shape: Config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": channels,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": sample_size,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
    return Part("diffusers", "AutoencoderKL", shape | config)


DIFFUSION_BETAS: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
