"""Pipelines that start a video from an image, or from another video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.coverage.calls.image_inputs import IMAGE, given_to
from tests.coverage.calls.registry import call
from tests.coverage.calls.variants import changed, components
from tests.pipelines import FAMILIES

#: A video of as many frames as the tiny families make, of their size.
VIDEO = {"video": [{}] * 5}


def sized(name: str) -> dict[str, Any]:
    """What a shared family's call is given, but for the number of frames, which is that of the video."""
    return {key: value for key, value in FAMILIES[name].call.items() if key != "num_frames"}


@call("wan_i2v", images=IMAGE, video=True, **FAMILIES["wan"].call)
def wan_image_to_video():
    given = components("wan")
    transformer = changed(given["transformer"], in_channels=2 * given["transformer"].config.in_channels + 4)
    return given_to(diffusers.WanImageToVideoPipeline, "wan", transformer=transformer)


@call("ltx_i2v", images=IMAGE, video=True, **FAMILIES["ltx"].call)
def ltx_image_to_video():
    return given_to(diffusers.LTXImageToVideoPipeline, "ltx")


@call("cogvideox_i2v", images=IMAGE, video=True, **FAMILIES["cogvideox"].call)
def cogvideox_image_to_video():
    given = components("cogvideox")
    transformer = changed(given["transformer"], in_channels=2 * given["transformer"].config.in_channels)
    return given_to(diffusers.CogVideoXImageToVideoPipeline, "cogvideox", transformer=transformer)


@call("wan_v2v", images=VIDEO, video=True, **sized("wan"), strength=0.7)
def wan_video_to_video():
    return given_to(diffusers.WanVideoToVideoPipeline, "wan")


@call("cogvideox_v2v", images=VIDEO, video=True, **sized("cogvideox"), strength=0.7)
def cogvideox_video_to_video():
    return given_to(diffusers.CogVideoXVideoToVideoPipeline, "cogvideox")


def wan_with_an_encoder(**config_: Any) -> Any:
    """Wan 2.1, which encodes images by CLIP, too."""
    given = components("wan")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    channels = 2 * given["transformer"].config.in_channels + 4
    more = {
        "transformer": changed(given["transformer"], in_channels=channels, image_dim=32, **config_),
        "image_encoder": transformers.CLIPVisionModel(config),
        "image_processor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
    }
    return given_to(diffusers.WanImageToVideoPipeline, "wan", **more)


@call("wan_i2v_encoder", images=IMAGE, video=True, **FAMILIES["wan"].call)
def wan_image_to_video_with_an_encoder():
    return wan_with_an_encoder()


@call("wan_flf2v", images=IMAGE | {"last_image": {}}, video=True, **FAMILIES["wan"].call)
def wan_first_and_last_frame_to_video():
    return wan_with_an_encoder(pos_embed_seq_len=10)  # four patches and a class for each of two images
