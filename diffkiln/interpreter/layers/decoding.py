"""Decoders that work on a batch's images one by one, or on tiles: diffusers' own, and what they need."""

from __future__ import annotations

import inspect
from typing import Any

import torch

#: Tiles of video decoders overlap by a quarter, as those of diffusers' image decoders do.
_STRIDE = 0.75


def parts_problem(module: torch.nn.Module, slicing: bool, tiling: bool, tile: int | None) -> str:
    """Returns why a decoder cannot work in slices or tiles; empty if it can."""
    kind = type(module).__name__
    for wanted, method, flag in ((slicing, "enable_slicing", "use_slicing"), (tiling, "enable_tiling", "use_tiling")):
        if wanted and not (hasattr(module, method) and hasattr(module, flag)):
            return f"diffusers gives {kind} no {method}"
    if tile is not None and not (_takes_sides(module) or hasattr(module, "tile_latent_min_size")):
        return f"the tiles of {kind} have a fixed size"
    return ""


def tile_side(module: torch.nn.Module, tile: int | None) -> int | None:
    """Returns the side of the tiles in pixels; None if the module does not say."""
    side = tile or getattr(module, "tile_sample_min_height", None) or getattr(module, "tile_sample_min_size", None)
    return int(max(side)) if isinstance(side, (list, tuple)) else side


def tile_unit(module: Any) -> int:
    """Returns the number of pixels that a tile's side must be a multiple of: four latents, so that tiles overlap by
    whole ones.

    Returns 1 for a decoder with another overlap.
    """
    latent = getattr(module, "tile_latent_min_size", None)
    if latent and getattr(module, "tile_overlap_factor", None) == 1 - _STRIDE:
        return 4 * round(getattr(module, "tile_sample_min_size", latent) / latent)
    if hasattr(module, "tile_overlap_factor_height"):
        return 4 * round(float(module.tile_sample_min_height) / float(module.tile_latent_min_height))  # type: ignore[arg-type]
    if hasattr(module, "tile_sample_stride_height"):
        return 4 * int(getattr(module, "spatial_compression_ratio", 1))
    return 1


def decode_in_parts(module: Any, slicing: bool, tiling: bool, tile: int | None) -> list[str]:
    """Makes a decoder work in slices or tiles from now on. Returns notes."""
    notes: list[str] = []
    if slicing:
        module.enable_slicing()
        notes.append("images one by one")
    if tiling:
        if tile is not None and _takes_sides(module):
            known = inspect.signature(module.enable_tiling).parameters
            given: dict[str, float] = {f"tile_sample_min_{side}": tile for side in ("height", "width")}
            given |= {f"tile_sample_stride_{side}": int(tile * _STRIDE) for side in ("height", "width")}
            given |= {f"tile_overlap_factor_{side}": 1 - _STRIDE for side in ("height", "width")}
            module.enable_tiling(**{name: value for name, value in given.items() if name in known})
        else:
            module.enable_tiling()
            if tile is not None:
                scale = module.tile_sample_min_size / module.tile_latent_min_size
                module.tile_sample_min_size, module.tile_latent_min_size = tile, int(tile / scale)
        notes.append(f"tiles of {tile_side(module, tile)} pixels")
    return notes


def _takes_sides(module: Any) -> bool:
    return "tile_sample_min_height" in inspect.signature(getattr(module, "enable_tiling", lambda: None)).parameters
