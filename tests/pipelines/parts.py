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
