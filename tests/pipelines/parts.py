"""Tiny text encoders and autoencoders that several families share."""

import diffusers
import transformers
from transformers import PreTrainedTokenizerBase

DIM = 32  # width of every text encoder


def clip_encoder(tokenizer: PreTrainedTokenizerBase, *, projection: bool = False, act: str = "quick_gelu"):
    """CLIP's text model, with SDXL's and SD3's projection of the pooled output if asked for."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        projection_dim=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_encoder(tokenizer: PreTrainedTokenizerBase, *, dim: int = DIM, multilingual: bool = False):
    """The encoder of T5 v1.1, or of UMT5 (a relative attention bias in each layer)."""
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": dim,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    if multilingual:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**settings))
    return transformers.T5EncoderModel(transformers.T5Config(**settings))


def autoencoder_kl(latent_channels: int, *, quant_conv: bool = True, **config):
    """The image VAE of Stable Diffusion and its successors: four levels, so 8 pixels a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **config,
    )


def flux_autoencoder():
    """The 16-channel VAE that FLUX.1, Chroma, Lumina 2 and Z-Image share."""
    return autoencoder_kl(16, quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)


def t5gemma_encoder(tokenizer: PreTrainedTokenizerBase):
    """The encoder of T5Gemma."""
    module = decoder_config(tokenizer) | {"sliding_window": 64, "query_pre_attn_scalar": 16}
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return transformers.T5GemmaEncoderModel(config)


def bert_encoder(tokenizer: PreTrainedTokenizerBase):
    """BERT, as HunyuanDiT uses it."""
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
        )
    )


def decoder_config(tokenizer: PreTrainedTokenizerBase, *, layers: int = 2) -> dict:
    """What the configurations of the decoder-only language models have in common: one key head for two queries."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": DIM,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def gemma2_encoder(tokenizer: PreTrainedTokenizerBase):
    """Gemma 2, whose attention alternates between a sliding window and everything."""
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**decoder_config(tokenizer), query_pre_attn_scalar=16, sliding_window=64)
    )


def qwen3_encoder(tokenizer: PreTrainedTokenizerBase, *, layers: int = 2, causal_lm: bool = False):
    """Qwen 3, bare or under its language-model head."""
    kind = transformers.Qwen3ForCausalLM if causal_lm else transformers.Qwen3Model
    return kind(transformers.Qwen3Config(**decoder_config(tokenizer, layers=layers)))


def qwen25_vl_encoder(tokenizer: PreTrainedTokenizerBase):
    """Qwen 2.5 VL, with the vision tower that text-to-image never calls."""
    text = decoder_config(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": DIM}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def mistral3_encoder(tokenizer: PreTrainedTokenizerBase, *, layers: int = 4):
    """Mistral 3, with the vision tower that text-to-image never calls."""
    text = decoder_config(tokenizer, layers=layers) | {"model_type": "mistral"}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )
