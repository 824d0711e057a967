"""Tiny checkpoints in the layout of the original Stable Diffusion, the inverse of what diffusers converts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_UNET = [
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
]
_RESNET = [
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
    ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."),
]  # fmt: skip
_VAE_ATTENTION = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]


def _unet_name(key: str, layers: int, attends: list[bool]) -> str:
    for pattern, new in _UNET:
        if re.match(pattern, key):
            return re.sub(pattern, new, key)
    side, number, kind, index, rest = re.match(
        r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ).groups()
    block, place = int(number or 0), int(index)
    if kind == "resnets":
        for old, new in _RESNET:
            rest = rest.replace(old, new) if rest.startswith(old) else rest
    if side == "mid_block":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if attends[block] else 1}.{rest}"
    part = 0 if kind == "resnets" else 1
    if side == "down_blocks":
        return f"input_blocks.{(layers + 1) * block + place + 1}.{part}.{rest}"
    return f"output_blocks.{(layers + 1) * block + place}.{part}.{rest}"


def _vae_name(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        for old, new in _VAE_ATTENTION:
            rest = rest.replace(old, new) if rest.startswith(old) else rest
        return f"{head}mid.attn_1.{rest}"
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", key)


def original(pipe: Any, path: Path) -> Path:
    """Saves a Stable Diffusion pipeline as one file in its original layout."""
    unet, vae = pipe.unet.config, pipe.vae.config
    attends = ["CrossAttn" in name for name in unet.up_block_types]
    state: dict[str, torch.Tensor] = {}
    for key, tensor in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{_unet_name(key, unet.layers_per_block, attends)}"] = tensor
    for key, tensor in pipe.vae.state_dict().items():
        name = _vae_name(key, len(vae.block_out_channels))
        linear = ".attn_1." in name and name.endswith("weight") and tensor.ndim == 2
        state[f"first_stage_model.{name}"] = tensor[:, :, None, None] if linear else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path
