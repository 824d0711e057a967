"""Files of LoRA adapters as diffusers reads them: its own converters turn the formats of trainers into one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.guards.limits import active
from diffkiln.interpreter.adapters import RANK_FIRST, RANK_SECOND
from diffkiln.interpreter.quiet import heard, quiet_libraries
from diffkiln.models.checkpoint import read_header


@dataclass(frozen=True)
class State:
    """An adapter as diffusers reads it.

    Attributes:
        tensors: By names that begin with the component.
        alphas: By the names of layers, where the format has them.
        metadata: PEFT's configuration, where the file has it.
        warnings: What diffusers warns of.
    """

    tensors: Mapping[str, torch.Tensor]
    alphas: Mapping[str, Any] | None
    metadata: Mapping[str, Any] | None
    warnings: Sequence[str]


def read_state(pipeline_class: Any, path: Path, ignored: Sequence[str] = (), unet_config: Any = None) -> State:
    """Reads an adapter by the converters of a pipeline's class.

    Args:
        pipeline_class: A class of diffusers that loads adapters.
        path: A safetensors file.
        ignored: Patterns of names of tensors that are left out.
        unet_config: Configuration of the U-Net, which kohya's names of blocks depend on.

    Raises:
        SourceError: It is not a safetensors file.
        LimitExceeded: It has more tensors, or one of a higher rank, than the limits allow.
        Exception: Whatever diffusers raises for a file that it does not know.
    """
    read = pipeline_class.lora_state_dict
    options: dict[str, Any] = {"weight_name": path.name, "local_files_only": True, "use_safetensors": True}
    parameters = inspect.signature(inspect.unwrap(read)).parameters
    if "return_alphas" in parameters:
        options["return_alphas"] = True
    if "unet_config" in parameters and unet_config is not None:
        options["unet_config"] = unet_config
    check_adapter(path)
    # The tensors of the file are real, also beside meta models.
    with quiet_libraries(), heard("diffusers") as warnings, _disable_current_modes():
        source: Any = str(path.parent)
        if ignored:
            source = {key: tensor for key, tensor in load_file(path).items() if not matches(key, ignored)}
        tensors, *rest = read(source, return_lora_metadata=True, **options)
    return State(tensors, rest[0] if len(rest) == 2 else None, rest[-1], warnings)


def as_peft(state: Mapping[str, torch.Tensor], encoder: bool) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of one component by the names that PEFT gives them.

    Args:
        state: By names without the component.
        encoder: Whether the component is one of transformers.
    """
    from diffusers.utils import state_dict_utils as convert

    if not state:
        return state
    if encoder:
        return convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(dict(state)))
    first = next(iter(state))
    if "lora_A" in first or any(".lokr_" in key for key in state):
        return state
    return convert.convert_unet_state_dict_to_peft(dict(state))


def check_adapter(path: Path) -> None:
    """Checks a file's header before the library reads all its tensors.

    Raises:
        SourceError: It is not a safetensors file.
        LimitExceeded: It has more tensors, or one of a higher rank, than the limits allow.
    """
    for name, tensor in read_header(path).items():
        for dimension, pattern in enumerate((RANK_FIRST, RANK_SECOND)):
            if len(tensor.shape) >= 2 and pattern.search(name):
                active().check("adapter_rank", tensor.shape[dimension], f"{path.name}, {name}")


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Returns True if one of the patterns matches."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)
