"""Qwen-Image as it is published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffkiln.models.known_parts import Architecture, Part
from diffkiln.models.stand_ins import WORDS, filled, merges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 151643


def _tokenizer(model_max_length: int) -> PreTrainedTokenizerBase:
    """Returns case-sensitive byte-level BPE with 151 643 tokens, then padding and the marks of a chat's turns."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    joined = merges((lead, *word) if lead else tuple(word) for word in WORDS for lead in ("Ġ", ""))
    tokens = [*sorted(ByteLevel.alphabet()), *dict.fromkeys(map("".join, joined))]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {token: i for i, token in enumerate((*filled(tokens, _TOKENS), *special))}
    made = Qwen2Tokenizer(
        vocab=vocab,
        merges=joined,  # pyright: ignore[reportArgumentType]  (pairs are what the backend takes)
        eos_token="<|im_end|>",
        model_max_length=model_max_length,
    )
    for token in special:
        made.add_tokens(AddedToken(token, special=True), special_tokens=True)  # pyright: ignore[reportArgumentType]
    return made


QWEN_IMAGE = Architecture(
    "QwenImagePipeline",
    "bfloat16",
    {
        "scheduler": Part(
            "diffusers",
            "FlowMatchEulerDiscreteScheduler",
            {
                "num_train_timesteps": 1000,
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
                "base_shift": 0.5,
                "max_shift": 0.9,
                "base_image_seq_len": 256,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
        ),
        "text_encoder": Part(
            "transformers",
            "Qwen2_5_VLForConditionalGeneration",
            {
                "model_type": "qwen2_5_vl",
                "tie_word_embeddings": False,
                "text_config": {
                    "model_type": "qwen2_5_vl_text",
                    "vocab_size": 152064,
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "max_position_embeddings": 128000,
                    "rms_norm_eps": 1e-06,
                    "tie_word_embeddings": False,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                },
                "vision_config": {
                    "model_type": "qwen2_5_vl",
                    "depth": 32,
                    "hidden_size": 1280,
                    "intermediate_size": 3420,
                    "num_heads": 16,
                    "out_hidden_size": 3584,
                    "patch_size": 14,
                    "window_size": 112,
                    "fullatt_block_indexes": [7, 15, 23, 31],
                },
            },
        ),
        "tokenizer": Part("transformers", "Qwen2Tokenizer", {"model_max_length": 131072}, _tokenizer),
        "transformer": Part(
            "diffusers",
            "QwenImageTransformer2DModel",
            {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
        ),
        "vae": Part("diffusers", "AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16}),
    },
    {},
)
