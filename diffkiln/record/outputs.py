"""What a recorded call gives: which fields of the pipeline's result are tensors, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffkiln.errors import RecordError
from diffkiln.program.calls import PICTURES, SOUNDS
from diffkiln.record.arrays import MarkedArray
from diffkiln.record.keywords import parameters_of
from diffkiln.record.structure import flatten
from diffkiln.record.tape import Tape

_RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")
#: Components that make sound, the last ones of a call first.
_SOUNDING = ("vocoder", "audio_vae", "vae", "unet")


def outputs_of(
    pipe: Any, result: Any, tape: Tape, output: str = "pt"
) -> tuple[Sequence[torch.Tensor], Mapping[str, Any]]:
    """Returns the tensors that a call gives, and how a program's signature names them.

    Args:
        pipe: the pipeline.
        result: what its call gave.
        tape: of the recording.
        output: the `output_type` that it was called with.

    Raises:
        RecordError: it gives none.
    """
    found = {name: _first(name, value, tape) for name, value in _fields(result).items()}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    first = next(iter(found), None)
    if first is None or first not in tensors:
        raise RecordError(f"{type(pipe).__name__} gives no tensor with output_type={output!r}")
    signature: dict[str, Any] = {"result": first}
    if len(tensors) > 1:
        signature["results"] = tuple(tensors)
    if sound := next((name for name in tensors if name in SOUNDS), None):
        signature |= {"sound": sound, "rate": rate_of(pipe)}
    if first not in PICTURES:
        signature["form"] = default_output_type(pipe) if output == "pt" else output
    return list(tensors.values()), signature


def of_field(result: Any, name: str) -> torch.Tensor | list[bool]:
    """Returns the tensor of one field of a call's result; of an array of pictures one with its channels first, and of
    truth values their list.
    """
    if alike := _alike(name, _fields(result)[name]):
        return torch.stack(alike)
    leaves = flatten(_fields(result)[name])[0]
    leaf = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor | np.ndarray)), None)
    if leaf is None:
        return [bool(leaf) for leaf in leaves]
    return leaf if isinstance(leaf, torch.Tensor) else _channels_first(name, torch.from_numpy(leaf))


def rate_of(pipe: Any) -> int | None:
    """Returns the samples a second of the sound that a pipeline makes; None where nothing of it says so."""
    parts = [pipe, *(getattr(pipe, name, None) for name in _SOUNDING)]
    for part in (holder for each in parts for holder in (each, getattr(each, "config", None))):
        for name in _RATES:
            value = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
            if isinstance(value, int | float) and value > 0:
                return int(value)
    return None


def default_output_type(pipe: Any) -> str:
    """Returns the form in which a pipeline gives its result where it is not asked for one."""
    parameter = parameters_of(pipe).get("output_type")
    return str(parameter.default) if parameter else "pt"


def _fields(result: Any) -> Mapping[str, Any]:
    return result if isinstance(result, Mapping) else {"result": result}


def _first(name: str, value: Any, tape: Tape) -> torch.Tensor | None:
    """Returns the first tensor of a field, where it depends on the request; of a list of pictures all of them."""
    if (alike := _alike(name, value)) and all(map(tape.is_marked, alike)):
        with torch.inference_mode(), tape:
            return torch.stack(alike)
    leaf = next((leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor | np.ndarray)), None)
    if isinstance(leaf, MarkedArray):
        with torch.inference_mode(), tape:
            return _channels_first(name, leaf.tensor())
    return leaf if isinstance(leaf, torch.Tensor) and tape.is_marked(leaf) else None


def _alike(name: str, value: Any) -> list[torch.Tensor]:
    """Returns the tensors of a list of pictures, as Qwen-Image's layers of each prompt are; [] of anything else."""
    if name not in PICTURES or not isinstance(value, list) or not all(isinstance(each, torch.Tensor) for each in value):
        return []
    return value if len({(each.shape, each.dtype) for each in value}) == 1 else []


def _channels_first(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Pictures as torch has them: a pipeline that gives arrays where tensors are asked for has the channels last."""
    return tensor.movedim(-1, -3) if name in PICTURES else tensor
