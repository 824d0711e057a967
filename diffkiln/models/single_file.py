"""Weights in one file of another layout, such as an original Stable Diffusion checkpoint, in a component's place.

Names and layouts of the file are the library's business: diffusers converts them as its `from_single_file` does, from
the header alone where no weights are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from diffkiln.errors import DiffkilnError, SourceError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.checkpoint import Checkpoint, SavedTensor, read_header

#: What the class that diffusers falls back on is known by: it takes every file that it does not know for this one.
_ANY, _OF_ANY = "v1", "model.diffusion_model.input_blocks.0.0.weight"


class _Enough(Exception):
    """Raised where weights would be put into a module: their names are known by then."""


def known_config(file: Path) -> str:
    """Returns the repository that diffusers takes the configuration of such a file from.

    Raises:
        SourceError: it knows none.
    """
    from diffusers.loaders import single_file_utils

    header = _meta(file)
    try:
        kind = single_file_utils.infer_diffusers_model_type(header)
        repo = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    except Exception as error:  # it looks at shapes and values of whatever has the names that it knows
        raise SourceError(_unknown(file)) from error
    if kind == _ANY and _OF_ANY not in header:
        raise SourceError(_unknown(file))
    return repo


def _unknown(file: Path) -> str:
    return (
        f"the layout of {file.name} is none that diffusers knows. Give its configuration: "
        '"config": a folder in diffusers\' format'
    )


def _meta(file: Path) -> dict[str, torch.Tensor]:
    """Returns the file's tensors without data."""
    header = read_header(file)
    return {
        name: torch.empty(row.shape, dtype=getattr(torch, row.dtype), device="meta") for name, row in header.items()
    }


def is_read_from(kind: type, file: Path) -> bool:
    """Returns True if `from_single_file` reads a component of this class from the file, and not from its own folder."""
    from diffusers.loaders.single_file_model import FromOriginalModelMixin
    from diffusers.loaders.single_file_utils import is_clip_model_in_single_file, is_t5_in_single_file

    if issubclass(kind, FromOriginalModelMixin):
        return True
    header = _meta(file)
    return bool(is_clip_model_in_single_file(kind, header) or (is_t5_in_single_file(header) and "T5" in kind.__name__))


def read_single_file(name: str, kind: type, root: Path, file: Path) -> Checkpoint:
    """Returns what the file holds of a component, under the component's own names. No weight is read.

    Raises:
        SourceError: it does not hold all of it.
    """
    from diffusers.loaders import single_file_model, single_file_utils

    found: dict[str, torch.Tensor] = {}

    def gathered(model: nn.Module, state: dict[str, torch.Tensor], *_args: Any, **_kwargs: Any) -> None:
        _refuse_missing(model, state)
        found.update({key: state[key] for key in model.state_dict() if key in state})
        raise _Enough

    with ExitStack() as stack:
        for module in (single_file_utils, single_file_model):
            stack.enter_context(mock.patch.object(module, "load_model_dict_into_meta", gathered))
        stack.enter_context(suppress(_Enough))
        _load(name, kind, root, file, _meta(file), None)
    return Checkpoint((), {key: _row(tensor, file) for key, tensor in found.items()})


def _row(tensor: torch.Tensor, file: Path) -> SavedTensor:
    return SavedTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes, file.name)


def _refuse_missing(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [key for key, _ in model.named_parameters() if key not in state and key not in tied]
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")


def load_single_file(name: str, kind: type, root: Path, file: Path, dtype: torch.dtype) -> nn.Module:
    """Returns the component with the file's weights.

    Raises:
        SourceError: it does not hold all of them, or they do not fit the configuration.
    """
    from safetensors.torch import load_file

    return _load(name, kind, root, file, load_file(file), dtype)


def _load(
    name: str, kind: type, root: Path, file: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> nn.Module:
    """Loads a component as `from_single_file` of the pipeline does."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    library = "transformers" if kind.__module__.startswith("transformers.") else "diffusers"
    named: dict[str, Any] = {"name": root.name, "cached_model_config_path": str(root.parent)}
    try:
        with quiet_libraries():
            module: Any = load_single_file_sub_model(
                library_name=library,
                class_name=kind.__name__,
                checkpoint=tensors,
                pipelines=pipelines,
                is_pipeline_module=False,
                **named,
                local_files_only=True,
                torch_dtype=dtype,
            )
    except (DiffkilnError, MemoryError, _Enough):
        raise
    except Exception as error:  # whatever the conversions raise for names that are not there
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SourceError(
            f"{file.name} does not hold it as diffusers reads such files ({reason}). Give it in the source's "
            f'"components": {{"{name}": {{"model": …}}}}'
        ) from error
    return module


__all__ = ["is_read_from", "known_config", "load_single_file", "read_single_file"]
