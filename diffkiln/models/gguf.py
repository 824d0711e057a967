"""The weights of a component from a GGUF file, in the place of its checkpoint.

Names and layouts of the file are the library's business: diffusers converts them as its `from_single_file` does.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkiln.errors import MissingDependency, SourceError
from diffkiln.interpreter.layers import store
from diffkiln.interpreter.layers.gguf import GGUF, unpacked
from diffkiln.models.gguf_header import check_gguf

#: Types that are no quantization: a matrix of them is a plain weight.
_PLAIN = ("F32", "F16", "BF16")


def put_gguf(module: nn.Module, name: str, file: Path) -> None:
    """Gives a module the weights of a GGUF file; quantized linear layers stay quantized.

    A module without data stays without: only the header is read, and the tensors that the conversion joins.

    Args:
        module: with its final types; changed in place.
        name: of the component, for messages.
        file: the GGUF file.

    Raises:
        MissingDependency: the package gguf is not installed.
        SourceError: the file cannot be read, or does not hold this module's weights.
    """
    state = _converted(module, name, file)
    wanted = module.state_dict(keep_vars=True)
    if missing := sorted(wanted.keys() - state.keys()):
        lacks = f"lacks {len(missing)} of its tensors, the first is {missing[0]}"
        raise SourceError(f"component {name}: {file.name} {lacks}")
    for key, parameter in wanted.items():
        kind, data, shape = state[key]
        if shape != tuple(parameter.shape):
            raise SourceError(
                f"component {name}: {file.name} holds {key} as {shape}, the model has {tuple(parameter.shape)}"
            )
        path, _, leaf = key.rpartition(".")
        layer = module.get_submodule(path)
        if kind not in _PLAIN and leaf == "weight" and isinstance(layer, nn.Linear):
            packed = data.to("meta") if parameter.is_meta else data.clone()
            store(layer, GGUF(kind, data.shape[1]), {"weight_data": packed})
        elif not parameter.is_meta:
            parameter.data.copy_(data if kind in _PLAIN[:2] else unpacked(data, kind, shape))


def _converted(module: nn.Module, name: str, file: Path) -> dict[str, tuple[str, torch.Tensor, tuple[int, ...]]]:
    """Returns the file's tensors under the module's names: type, packed data, and shape of the values."""
    check_gguf(file)
    try:
        state = _read(file)
        if state.keys() != module.state_dict().keys():
            state = _renamed(module, state)
    except ImportError:
        raise MissingDependency("a GGUF file is read with gguf: pip install 'diffkiln[gguf]'") from None
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries raise
        raise SourceError(f"component {name}: {file.name} cannot be read: {type(error).__name__}: {error}") from error
    found = {}
    for key, tensor in state.items():
        kind = getattr(tensor, "quant_type", None)
        if kind is None:
            found[key] = ("F16" if tensor.dtype == torch.float16 else "F32", tensor, tuple(tensor.shape))
        else:
            found[key] = (kind.name, tensor.as_tensor(), tuple(tensor.quant_shape))  # type: ignore[attr-defined]
    return found


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Reads a file as diffusers' load_gguf_checkpoint does, with the file's memory mapped instead of copied."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter

    state: dict[str, torch.Tensor] = {}
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mapped memory must not be written to, and it is not
        for row in gguf.GGUFReader(file).tensors:
            data = torch.from_numpy(row.data)
            if row.tensor_type in plain:
                state[row.name] = data
            elif row.tensor_type in SUPPORTED_GGUF_QUANT_TYPES:
                state[row.name] = GGUFParameter(data, quant_type=row.tensor_type)  # pyright: ignore[reportCallIssue]
            else:
                raise SourceError(
                    f"{file.name} holds {row.name} as {row.tensor_type.name}, which diffusers cannot unpack"
                )
    return state


def _renamed(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known: Any = SINGLE_FILE_LOADABLE_CLASSES.get(type(module).__name__)
    if known is None:
        raise SourceError(f"diffusers converts no single files for a {type(module).__name__}, and the names differ")
    convert = known["checkpoint_mapping_fn"]
    return convert(checkpoint=state, config=dict(module.config))  # type: ignore[arg-type, call-overload]
