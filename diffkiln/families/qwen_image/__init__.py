"""Qwen-Image and Qwen-Image-Edit, whose text encoder is Qwen 2.5 VL."""

from __future__ import annotations

from diffkiln.families import Family
from diffkiln.families.qwen_image import edit, prompts, vision
from diffkiln.families.qwen_image.architecture import QWEN_IMAGE

PLUGIN = Family(
    patches=(*prompts.PATCHES, *edit.PATCHES, *vision.PATCHES),
    architectures={"qwen-image": QWEN_IMAGE},
)
