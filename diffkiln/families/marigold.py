"""Marigold: its image processor looks through an image for numbers that are not from 0 to 1."""

from __future__ import annotations

from typing import Any

from diffkiln.families import Family
from diffkiln.record.patches import Patch


def _in_range(*_args: Any) -> None:
    """Accepts all images: eight bits divided by 255 are in range, and the runtime refuses numbers that are not."""


PLUGIN = Family(
    patches=(
        Patch(
            {"check_image_values_range": "c7fe1e2e02f256d3"},
            _in_range,
            known_in="MarigoldImageProcessor",
        ),
    ),
)
