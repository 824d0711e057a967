"""Pipelines that take no text: noise alone, a class, or an image."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.autoencoders.vq_model import VQModel

from tests.coverage.calls.derived import assembled, model
from tests.coverage.calls.image_inputs import IMAGE
from tests.coverage.calls.parts import image_encoder, image_processor
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import changed, components
from tests.pipelines import parts, tokenizers
from tests.pipelines.parts import DIM
from tests.pipelines.unet_families import NOISE_SCHEDULE

LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}


def unet_2d(**settings: Any) -> Any:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**LEVELS | blocks | {"attention_head_dim": 8} | settings)


def vq_model() -> Any:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_vq_embeddings=16,
        latent_channels=3,
    )


@call("ddpm")
def ddpm():
    return diffusers.DDPMPipeline(unet_2d(), diffusers.DDPMScheduler())


@call("ddim")
def ddim():
    return diffusers.DDIMPipeline(unet_2d(), diffusers.DDIMScheduler())


@call("pndm", steps=5)
def pndm():
    return assembled("PNDMPipeline", {"unet": unet_2d(), "scheduler": diffusers.PNDMScheduler()})


@call("consistency", class_labels=2)
def consistency():
    unet = unet_2d(num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())


@call("score_sde")
def score_sde():
    return assembled("ScoreSdeVePipeline", {"unet": unet_2d(), "scheduler": diffusers.ScoreSdeVeScheduler()})


@call(
    "repaint",
    images={"image": {"height": 32, "width": 32}, "mask_image": {"height": 32, "width": 32}},
    jump_length=1,
    jump_n_sample=2,
)
def repaint():
    return assembled("RePaintPipeline", {"unet": unet_2d(sample_size=32), "scheduler": diffusers.RePaintScheduler()})


@call("dance", gives="sound", audio_length_in_s=256 / 16000)
def dance():
    unet = diffusers.UNet1DModel(
        block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=256, sample_rate=16000
    )
    return assembled("DanceDiffusionPipeline", {"unet": unet, "scheduler": diffusers.IPNDMScheduler()})


@call("ldm")
def ldm():
    return assembled("LDMPipeline", {"vqvae": vq_model(), "unet": unet_2d(), "scheduler": diffusers.DDIMScheduler()})


@call("ldm_enlarge", images={"image": {"height": 32, "width": 32}})
def ldm_enlarge():
    given = {"vqvae": vq_model(), "unet": unet_2d(in_channels=6, out_channels=3)}
    return assembled("LDMSuperResolutionPipeline", given | {"scheduler": diffusers.DDIMScheduler()})


@call("dit", class_labels=[3], guidance_scale=4.0)
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(
        transformer, parts.autoencoder_kl(4), diffusers.DDIMScheduler(), id2label={3: "fox", 4: "dog"}
    )


@call("svd", images=IMAGE, video=True, height=64, width=64, num_frames=2, decode_chunk_size=1)
def stable_video():
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1
        ),
        image_encoder=image_encoder(size=224, patch=56),
        unet=model(
            "UNetSpatioTemporalConditionModel",
            in_channels=8,
            cross_attention_dim=DIM,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=image_processor(),
    )


def marigold(kind: str, channels: int = 4, **settings: Any) -> Any:
    given = components("sd")
    unet = changed(given["unet"], in_channels=4 + channels, out_channels=channels)
    scheduler = diffusers.DDIMScheduler(**NOISE_SCHEDULE, prediction_type="v_prediction", clip_sample=False)
    own = {"default_denoising_steps": 3, "default_processing_resolution": 64}
    return assembled(kind, given | {"unet": unet, "scheduler": scheduler}, **own | settings)


@call("marigold_depth", images=IMAGE)
def marigold_depth():
    return marigold("MarigoldDepthPipeline", prediction_type="depth")


@call("marigold_normals", images=IMAGE)
def marigold_normals():
    return marigold("MarigoldNormalsPipeline", prediction_type="normals")


@call("marigold_intrinsics", images=IMAGE)
def marigold_intrinsics():
    names = {"target_names": ["albedo", "shading"]}
    return marigold("MarigoldIntrinsicsPipeline", 8, prediction_type="intrinsics", target_properties=names)


@call("shap_e", gives="views of a shape", output="np", guidance_scale=4.0, frame_size=32)
def shap_e():
    tokenizer = tokenizers.clip()
    given = {"tokenizer": tokenizer, "text_encoder": parts.clip_encoder(tokenizer, projection=True)}
    return assembled("ShapEPipeline", given | shap_parts())


@call("shap_e_image", gives="views of a shape", images=IMAGE, output="np", guidance_scale=4.0, frame_size=32)
def shap_e_image():
    given = {"image_encoder": image_encoder(projection=False), "image_processor": image_processor()}
    return assembled("ShapEImg2ImgPipeline", given | shap_parts(embedding_proj_norm_type="layer"))


def shap_parts(**settings: Any) -> dict[str, Any]:
    from diffusers.pipelines.shap_e.renderer import ShapERenderer

    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        embedding_dim=8,
        num_embeddings=32,  # rows of the matrices that the prior makes for the renderer
        clip_embed_dim=16,
        embedding_proj_dim=DIM,
        time_embed_dim=64,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        **settings,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1)
    )
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
        clip_sample_range=1.0,
    )
    return {"prior": prior, "shap_e_renderer": renderer, "scheduler": scheduler}


@call("kandinsky6_enlarge", video=True, images={"video": [{"height": 128, "width": 128}]}, steps=1)
def kandinsky6_enlarge():
    return diffusers.Kandinsky6SRPipeline(
        transformer=model(
            "Kandinsky6SRTransformer3DModel", in_visual_dim=8, out_visual_dim=8, tile_sizes=((256, 256),)
        ),
        vae=diffusers.Kandinsky6SRVAE(
            latent_channels=8,
            encoder_block_out_channels=(8, 8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
