"""Files of LoRA adapters with random factors, in the names that diffusers saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch


def drawn(shape: tuple[int, ...], generator: torch.Generator, deviation: float) -> torch.Tensor:
    """Numbers that are the same on every CPU: torch's normal numbers differ on one without AVX2."""
    return (torch.rand(shape, generator=generator) - 0.5) * 12**0.5 * deviation


def adapter_of(
    path: Path,
    modules: Mapping[str, torch.nn.Module],
    endings: tuple[str, ...],
    *,
    rank: int = 4,
    seed: int = 0,
    alpha: float | None = None,
    strength: float = 0.3,
) -> Path:
    """Save an adapter of linear layers and convolutions whose last name, or last two, are among `endings`."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for component, module in modules.items():
        for name, layer in module.named_modules():
            if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) or not f".{name}".endswith(_dotted(endings)):
                continue
            outputs, *inside = layer.weight.shape
            down = drawn((rank, *inside), generator, torch.Size(inside).numel() ** -0.5)
            up = drawn((outputs, rank, *[1] * (len(inside) - 1)), generator, strength * rank**-0.5)
            key = f"{component}.{name}"
            state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = down, up
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path, metadata=_configuration(state, rank, alpha) if alpha else None)
    return path


def _configuration(state: Mapping[str, torch.Tensor], rank: int, alpha: float) -> dict[str, str]:
    """PEFT's configuration of each component, as diffusers saves it in the header."""
    table: dict[str, object] = {}
    for component in sorted({key.partition(".")[0] for key in state}):
        layers = [key.removeprefix(f"{component}.").removesuffix(".lora_A.weight") for key in state if "lora_A" in key]
        fields = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "use_rslora": rank == 2}
        table |= {f"{component}.{field}": value for field, value in fields.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(table)}


def _dotted(endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{ending}" for ending in endings)
