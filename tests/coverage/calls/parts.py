"""Tiny encoders of images, and what else the calls of several pipelines share."""

from __future__ import annotations

from typing import Any

import transformers

from tests.pipelines.parts import DIM

VISION = {"hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DEPTH = {
    **VISION,
    "num_hidden_layers": 4,
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
    "reassemble_factors": [4, 2, 1, 0.5],
    "is_hybrid": False,
}


def image_encoder(*, projection: bool = True, layers: int = 2, size: int = 28, patch: int = 14) -> Any:
    """CLIP's vision model, for images of 28 × 28 pixels: four patches."""
    kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    settings = VISION | {"num_hidden_layers": layers}
    return kind(transformers.CLIPVisionConfig(**settings, projection_dim=DIM, image_size=size, patch_size=patch))


def image_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def siglip_encoder() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, image_size=28, patch_size=14))


def siglip_processor() -> Any:
    return transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
