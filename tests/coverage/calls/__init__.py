"""Tiny pipelines beyond those of `tests/pipelines`, for their calls alone: each is recorded, replayed and compared."""

from tests.coverage.calls import (  # noqa: F401  (they register)
    cascades,
    image_inputs,
    images,
    modular,
    newer_images,
    newer_videos,
    sound,
    transformer_variants,
    unconditional,
    unet_variants,
    variants,
    video_inputs,
    video_variants,
    videos,
)
from tests.coverage.calls.registry import CALLS

__all__ = ["CALLS"]
