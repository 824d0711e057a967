"""Image files that the command line gives to a call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from diffkiln.program.images import DEEP, IMAGES


def read_images(given: Sequence[str]) -> dict[str, Any]:
    """Returns the images by keyword: one image, or a list if several files are for one keyword.

    Args:
        given: "FILE", for the keyword `image`, or "KEYWORD=FILE". A file for `video` may be an animation.

    Raises:
        click.BadParameter: a file that is not an image, or an image of more than eight bits.
    """
    found: dict[str, list[Any]] = {}
    for item in given:
        keyword, _, name = item.partition("=")
        keyword, name = (keyword, name) if keyword in IMAGES and name else ("image", item)
        found.setdefault(keyword, []).extend(_read(Path(name), every_frame=keyword == "video"))
    return {keyword: images[0] if len(images) == 1 else images for keyword, images in found.items()}


def _read(path: Path, every_frame: bool) -> list[Any]:
    """Reads the first frame, or all, as RGB, turned as the camera says, like diffusers' `load_image`."""
    from PIL import Image, ImageOps, ImageSequence

    try:
        with Image.open(path) as image:
            if not image.mode.startswith(DEEP):
                frames = ImageSequence.Iterator(image) if every_frame else [image]
                return [ImageOps.exif_transpose(frame).convert("RGB") for frame in frames]
            reason = f"its mode {image.mode!r} has more than eight bits. Save it with eight"
    except Exception as error:  # whatever Pillow raises for broken files
        reason = str(error)
        if isinstance(error, FileNotFoundError) and "=" in str(path):
            reason += f". Keywords of images are {', '.join(IMAGES)}"
    raise click.BadParameter(f"{path} cannot be read as an image: {reason}", param_hint="--image")
