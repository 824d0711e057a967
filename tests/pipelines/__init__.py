"""Tiny diffusers pipelines, built from configuration with seeded random weights: nothing is downloaded.

>>> folder = build_folder("flux", tmp_path)  # what DiffusionPipeline.from_pretrained loads
>>> pipe = FAMILIES["flux"].build()  # the same pipeline in memory
>>> pipe(prompt="a prompt", **FAMILIES["flux"].call).images[0]
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests.pipelines import image_families, more_families, unet_families, video_families  # noqa: F401  (they register)
from tests.pipelines.registry import FAMILIES, Family

__all__ = ["FAMILIES", "WARNING_FILTERS", "Family", "build_folder"]

# Warnings of the libraries themselves, in the form of pytest's `filterwarnings`, for tests that run a pipeline.
WARNING_FILTERS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers",
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning:diffusers",
    "ignore:The decode_latents method is deprecated:FutureWarning",
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
)


def build_folder(name: str, root: Path) -> Path:
    """Save the family `name` under `root` and return its folder; built once, also when several processes ask."""
    folder = root / name
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        FAMILIES[name].build().save_pretrained(staging, safe_serialization=True)
        os.rename(staging, folder)
    except OSError:
        # Another process was first: a folder cannot be renamed onto one that is not empty.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
