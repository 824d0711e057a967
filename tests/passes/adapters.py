"""LoRA adapters for tiny pipelines, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch


def _drawn(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of variance one, the same on every CPU: torch's normal numbers differ on one without AVX2."""
    return (torch.rand(rows, columns, generator=generator) - 0.5) * 12**0.5


def adapter(
    path: Path, module: torch.nn.Module, prefix: str, *, ending: str = "to_q", rank: int = 4, seed: int = 0
) -> Path:
    """Save an adapter of the layers whose names end so, under the names that diffusers saves."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ending):
            down = _drawn(rank, layer.in_features, generator) * layer.in_features**-0.5
            up = _drawn(layer.out_features, rank, generator) * rank**-0.5
            state[f"{prefix}.{name}.lora_A.weight"], state[f"{prefix}.{name}.lora_B.weight"] = down, up
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    return path


def kohya(path: Path, module: torch.nn.Module, *, ending: str = "to_q", rank: int = 4, alpha: float = 2.0) -> Path:
    """The same for a UNet in the format of kohya's scripts, which has alphas."""
    generator = torch.Generator().manual_seed(7)
    state: dict[str, Any] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ending):
            key = "lora_unet_" + name.replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.1
            state[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.1
            state[f"{key}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(state, path)
    return path


def for_both(path: Path, unet: torch.nn.Module, encoder: torch.nn.Module, *, magnitudes: bool = False) -> Path:
    """An adapter of a U-Net and of its text encoder in one file of kohya's, as trainers save them."""
    state = safetensors.torch.load_file(kohya(path, unet))
    generator = torch.Generator().manual_seed(8)
    for name, layer in encoder.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")):
            key = "lora_te_text_model_" + name.removeprefix("text_model.").replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(4, layer.in_features, generator=generator) * 0.1
            state[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 4, generator=generator) * 0.1
            state[f"{key}.alpha"] = torch.tensor(4.0)
    if magnitudes:
        for key in [name for name in state if name.startswith("lora_unet") and name.endswith("lora_down.weight")]:
            rows = state[key.replace("lora_down", "lora_up")].shape[0]
            state[key.replace("lora_down.weight", "dora_scale")] = torch.ones(rows, 1)
    safetensors.torch.save_file(state, path)
    return path
