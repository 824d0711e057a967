"""Tiny pipelines beyond those of `tests/pipelines`, for their calls alone: each is recorded, replayed and compared."""

from tests.coverage.calls import image_inputs, images, variants, video_inputs, videos  # noqa: F401  (they register)
from tests.coverage.calls.registry import CALLS

__all__ = ["CALLS"]
