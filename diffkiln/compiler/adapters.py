"""LoRA adapters of any format that diffusers reads, converted to the one that the runtime reads by itself."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffkiln.bundle import Verified, open_bundle
from diffkiln.bundle.layout import PIPELINE
from diffkiln.errors import DiffkilnError, SourceError
from diffkiln.guards.gate import gated
from diffkiln.interpreter.adapters import other_method
from diffkiln.models.adapters import State, as_peft, read_state
from diffkiln.models.checkpoint import read_header
from diffkiln.runtime.adapters.file import CONFIGURATION
from diffkiln.runtime.adapters.reading import Wanted, read_adapter
from diffkiln.runtime.adapters.targets import denoiser, read_layers

_UNET = "unet"


@dataclass(frozen=True)
class Converted:
    """A converted adapter: its file, the layers that it changes, and what diffusers warned of."""

    path: Path
    layers: int
    notices: tuple[str, ...]


@gated()
def convert_adapter(
    file: str | os.PathLike[str], bundle: str | os.PathLike[str], output: str | os.PathLike[str], force: bool = False
) -> Converted:
    """Converts an adapter of a trainer's format to the one that `load_lora` reads, and checks it against a bundle.

    Args:
        file: A safetensors file in any format that diffusers reads.
        bundle: The bundle that the adapter is for.
        output: The new file, with diffusers' and PEFT's names. It appears once it is whole.
        force: Replace a file that is there.

    Raises:
        SourceError: The file is no adapter that diffusers reads, or is of a method other than LoRA; or the output is
            there already.
        CallError: The adapter is for another architecture, or changes what the bundle does not have.
    """
    source, target = Path(file).expanduser(), Path(output).expanduser()
    if target.exists() and not force:
        raise SourceError(f"{target} is there already. Give another output, or --force to replace it")
    _check_method(source)
    with open_bundle(bundle) as opened, opened.verify(roles={"config"}) as verified:
        state = _state(verified, source)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".lora-") as room:
            made = Path(room) / target.name
            save_file(_renamed(state), made, metadata=_metadata(state.metadata))
            layers = _checked(verified, made)
            os.replace(made, target)
    return Converted(target, layers, tuple(dict.fromkeys(" ".join(text.split())[:200] for text in state.warnings)))


def _check_method(source: Path) -> None:
    """Raises `SourceError` for a file with tensors of another method, which diffusers would partly leave out."""
    if source.suffix != ".safetensors":
        raise SourceError(
            f"{source.name} is not a safetensors file. Save the adapter as safetensors: a pickle can run code"
        )
    if not source.is_file():
        raise SourceError(f"there is no file {source}. Give the adapter's safetensors file")
    keys = sorted(read_header(source))
    if other := next((key for key in keys if other_method(key)), None):
        raise SourceError(
            f"{source.name} is of {other_method(other)}, as {other} shows, and not of LoRA. Merge it into the model "
            "before you compile: diffusers' fuse_lora, or the pass fuse_lora"
        )


def _state(verified: Verified, source: Path) -> State:
    """Returns the adapter as the bundle's own class of pipeline reads it."""
    import diffusers

    name = verified.manifest.pipeline.class_name
    kind = getattr(diffusers, name, None)
    if not callable(getattr(kind, "lora_state_dict", None)):
        raise SourceError(f"diffusers loads no adapters into a {name}, so it has no converters for {source.name}")
    try:
        return read_state(kind, source, unet_config=_unet_config(verified))
    except (DiffkilnError, MemoryError):
        raise
    except Exception as error:  # whatever diffusers' conversion raises for a file that it does not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SourceError(
            f"{source.name} is not an adapter that diffusers reads for a {name}: {reason}. Give one that was trained "
            "on this model"
        ) from error


def _unet_config(verified: Verified) -> Any:
    from diffusers.configuration_utils import FrozenDict

    path = f"{PIPELINE}{_UNET}/config.json"
    here = any(row.path == path for row in verified.files)
    return FrozenDict(json.loads(verified.read(path))) if here else None


def _renamed(state: State) -> dict[str, torch.Tensor]:
    """Returns the tensors and the alphas by PEFT's names, each in memory of its own."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.tensors.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = tensor
    found: dict[str, torch.Tensor] = {}
    for component, own in parts.items():
        for name, tensor in as_peft(own, encoder=component.startswith("text_encoder")).items():
            found[f"{component}.{name}"] = tensor
    named = {id(tensor): name for name, tensor in found.items()}
    before = {key: named.get(id(tensor), key) for key, tensor in state.tensors.items()}
    alphas = {
        f"{_layer(key.removesuffix('.alpha'), before)}.alpha": torch.tensor(float(value))
        for key, value in (state.alphas or {}).items()
    }
    return {name: tensor.contiguous().clone() for name, tensor in found.items()} | alphas


def _layer(key: str, before: Mapping[str, str]) -> str:
    """Returns the layer of an alpha, which diffusers calls after the layer, or after its first factor."""
    return before[key].removesuffix(".lora_A.weight") if key in before else key


def _metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    return {CONFIGURATION: json.dumps(metadata)} if metadata else {"format": "pt"}


def _checked(verified: Verified, made: Path) -> int:
    """Reads the new file as the runtime does; returns the number of layers that it changes."""
    components = frozenset(verified.manifest.weights)
    wanted = Wanted(components, denoiser(components), requantize=True)
    adapter = read_adapter(made, wanted, lambda name: read_layers(verified, name), torch.device("cpu"))
    return len(adapter.changes)
