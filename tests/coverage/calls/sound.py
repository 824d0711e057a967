"""Pipelines that make sound."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.coverage.calls.derived import assembled, derived, model
from tests.coverage.calls.registry import call
from tests.pipelines import parts, tokenizers
from tests.pipelines.parts import DIM
from tests.pipelines.unet_families import NOISE_SCHEDULE

TEXT = {"hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clap_config(tokenizer: Any) -> Any:
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 80, "projection_dim": DIM}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2}
    audio = {"spec_size": 64, "window_size": 4, "num_mel_bins": 16, "hidden_size": DIM, "projection_dim": DIM}
    audio |= {"depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 2, "patch_embeds_hidden_size": 16}
    return transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=DIM)


def mel_vae() -> Any:
    """Of pictures of sound: one channel, four times smaller."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    )


def vocoder() -> Any:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config)


def mel_unet(**settings: Any) -> Any:
    levels = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(**levels | blocks | settings)


def classed() -> Any:
    """Conditioned by what the text is as a whole, in the place of a class."""
    return mel_unet(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=DIM,
        class_embeddings_concat=True,
        cross_attention_dim=(16, 32),
    )


@call("audio_ldm", gives="sound", audio_length_in_s=0.01, guidance_scale=2.5)
def audio_ldm():
    tokenizer = tokenizers.roberta()
    return assembled(
        "AudioLDMPipeline",
        {
            "vae": mel_vae(),
            "text_encoder": transformers.ClapTextModelWithProjection(clap_config(tokenizer).text_config),
            "tokenizer": tokenizer,
            "unet": classed(),
            "scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False),
            "vocoder": vocoder(),
        },
    )


@call("audio_ldm2", gives="sound", audio_length_in_s=0.01, guidance_scale=3.5, max_new_tokens=4)
def audio_ldm2():
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel

    tokenizer, tokenizer_2 = tokenizers.roberta(), tokenizers.t5()
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_inner=32, vocab_size=64, n_positions=600, bos_token_id=0, eos_token_id=1
    )
    given = {
        "vae": mel_vae(),
        "text_encoder": transformers.ClapModel(clap_config(tokenizer)),
        "text_encoder_2": parts.t5_encoder(tokenizer_2),
        "projection_model": AudioLDM2ProjectionModel(DIM, DIM, 16),
        "language_model": transformers.GPT2LMHeadModel(config),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "feature_extractor": transformers.ClapFeatureExtractor(feature_size=16, sampling_rate=16000),
        "unet": AudioLDM2UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=((None, 16, DIM),) * 2,
        ),
        "scheduler": diffusers.DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False),
        "vocoder": vocoder(),
    }
    return assembled("AudioLDM2Pipeline", given)


@call("stable_audio", gives="sound", audio_end_in_s=0.008, guidance_scale=7.0)
def stable_audio():
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    tokenizer = tokenizers.t5(max_length=16)
    return diffusers.StableAudioPipeline(
        vae=oobleck(channels=8),
        text_encoder=parts.t5_encoder(tokenizer),
        projection_model=StableAudioProjectionModel(DIM, DIM, 0.0, 10.0),
        tokenizer=tokenizer,
        transformer=diffusers.StableAudioDiTModel(
            sample_size=16,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=8,
            cross_attention_dim=DIM,
            time_proj_dim=16,
            global_states_input_dim=2 * DIM,
            cross_attention_input_dim=DIM,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )


def oobleck(channels: int) -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=16000,
    )


@call("stable_audio3", gives="sound", duration=0.02, guidance_scale=4.0)
def stable_audio3():
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    tokenizer = tokenizers.gemma(max_length=16)
    return diffusers.StableAudio3Pipeline(
        vae=diffusers.AutoencoderSAME(
            patch_size=4,
            encoder_channels=16,
            encoder_c_mults=(2,),
            encoder_strides=(4,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            dim_heads=16,
            sampling_rate=16000,
        ),
        text_encoder=parts.t5gemma_encoder(tokenizer),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=DIM, fourier_dim=16),
        transformer=model("StableAudio3DiTModel", cond_token_dim=DIM, global_cond_dim=DIM),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


WAVE = {"audio": {"shape": [1, 2, 320]}}
derived(
    "stable_audio3_again",
    "StableAudio3AudioToAudioPipeline",
    "stable_audio3",
    gives="sound",
    images=WAVE,
    without=("guidance_scale",),
    init_noise_level=0.7,
)
derived(
    "stable_audio3_inpaint",
    "StableAudio3InpaintPipeline",
    "stable_audio3",
    gives="sound",
    images=WAVE,
    without=("guidance_scale",),
    mask_start_seconds=0.005,
    mask_end_seconds=0.01,
)


@call("longcat_audio", gives="sound", audio_duration_s=0.01, guidance_scale=4.0)
def longcat_audio():
    tokenizer = tokenizers.t5()
    return diffusers.LongCatAudioDiTPipeline(
        vae=diffusers.LongCatAudioDiTVae(
            channels=8,
            c_mults=[1, 2],
            strides=[2, 4],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=8,
            sample_rate=16000,
        ),
        text_encoder=parts.t5_encoder(tokenizer, multilingual=True),
        tokenizer=tokenizer,
        transformer=model("LongCatAudioDiTTransformer", dit_text_dim=DIM),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )


@call(
    "ace_step",
    gives="sound",
    audio_duration=0.02,
    guidance_scale=4.0,
    lyrics="la la",
    max_text_length=64,
    max_lyric_length=32,
)
def ace_step():
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    tokenizer = tokenizers.qwen()
    width = {"hidden_size": DIM, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    width |= {"head_dim": 16, "sliding_window": 8}
    return diffusers.AceStepPipeline(
        vae=oobleck(channels=8),
        text_encoder=parts.qwen3_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.AceStepTransformer1DModel(
            **width, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, encoder_hidden_size=DIM
        ),
        condition_encoder=AceStepConditionEncoder(
            **width,
            text_hidden_dim=DIM,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
