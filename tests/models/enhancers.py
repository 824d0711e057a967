"""Tiny models that make pictures of pictures: Swin2SR's folder, an autoencoder's, and files of upscalers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.upscalers.rrdbnet import RRDBNet
from diffkiln.models.upscalers.srvgg import SRVGGNetCompact
from tests.pipelines.registry import seeded


def _moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights that none of its initial values hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return module.eval().requires_grad_(False)


def swin2sr(folder: Path, scale: int = 2, **config: Any) -> torch.nn.Module:
    """A folder of transformers' Swin2SR, and the model; its windows are of 4 pixels."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    small = {"image_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 4, "mlp_ratio": 2.0}
    with seeded(0):
        made = Swin2SRForImageSuperResolution(Swin2SRConfig(**{**small, **config}, upscale=scale))
    with quiet_libraries():
        _moved(made).save_pretrained(folder)
    return made


def autoencoder(folder: Path) -> torch.nn.Module:
    """A folder of diffusers' AutoencoderTiny, which gives pictures of the same size, and the model."""
    from diffusers import AutoencoderTiny

    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with seeded(0):
        made = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    with quiet_libraries():
        _moved(made).save_pretrained(folder)
    return made


def rrdbnet(file: Path, unit: int = 2, prefix: str = "") -> torch.nn.Module:
    """A file of a network of dense blocks, and the model; it enlarges 4 / unit times."""
    with seeded(0):
        return _saved(RRDBNet(8, 4, 2, unit), file, prefix)


def srvgg(file: Path, scale: int = 2) -> torch.nn.Module:
    """A file of a compact network, and the model."""
    with seeded(0):
        return _saved(SRVGGNetCompact(8, 2, scale), file)


def _saved(module: torch.nn.Module, file: Path, prefix: str = "") -> torch.nn.Module:
    save_file({f"{prefix}{name}": tensor for name, tensor in _moved(module).state_dict().items()}, file)
    return module
