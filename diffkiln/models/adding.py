"""Opens models that are added to a pipeline: a folder, a pinned repository on the Hub, or a file of an upscaler."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from diffkiln import plugins
from diffkiln.errors import DiffkilnError
from diffkiln.interpreter.quiet import quiet_imports
from diffkiln.models.added import Added
from diffkiln.models.checkpoint import Checkpoint, read_header
from diffkiln.models.components import Component, read_component
from diffkiln.models.folder import source_error
from diffkiln.models.opening import files_of, single_file
from diffkiln.models.upscalers import Upscaler, plain_names
from diffkiln.spec.model import ComponentSource


@quiet_imports()
def open_added(name: str, given: ComponentSource, base: Path, signed: bool | None = None) -> Added:
    """Finds and checks a model that is to be added. No weight is read.

    Args:
        name: that it gets in the pipeline.
        given: a `model`, or a `single_file`.
        base: the folder that relative paths start from.
        signed: whether it takes pictures from -1 to 1; by default models of diffusers do.

    Raises:
        SourceError: it is not there, or is no model that is known; its places begin with a dot.
        MissingDependency: a Hub repository is asked for and huggingface_hub is not installed.
    """
    if given.single_file is not None:
        return Added(_from_file(name, single_file(given.single_file, base, ".file")), bool(signed))
    files = files_of(name, [given], base, "")
    if not (files.folders[0] / "config.json").is_file():
        reason = (
            f"the folder {files.folders[0].name} has no config.json, so it is no model of diffusers or transformers"
        )
        raise source_error(reason, "Name the folder of one model", ".model")
    component = read_component(name, files, None, weights=True)
    if component.library is None or component.members:
        raise source_error(f"{component.kind.__name__} is no model", "Name the folder of one model", ".model")
    signed = component.library == "diffusers" if signed is None else signed
    return Added(component, signed, dict(next(iter(files.origin), {})))


def _from_file(name: str, file: Path) -> Component:
    header = read_header(file)
    names = plain_names(header)
    shapes = {names[key]: tuple(row.shape) for key, row in header.items()}
    known = {key: plugin.load() for key, plugin in plugins.plugins("upscalers").items()}
    upscaler: Upscaler | None = next((each for each in known.values() if each.fits(shapes)), None)
    if upscaler is None:
        first = ", ".join(sorted(shapes)[:3]) or "none"
        reason = f"the tensors of {file.name} are those of no upscaler that is known ({first}, …)"
        hint = f"Known are {', '.join(known)}; give a model of transformers as a folder"
        raise source_error(reason, hint, ".file")
    checkpoint = Checkpoint((), {names[key]: row for key, row in header.items()})
    build = partial(_module, file, upscaler, checkpoint)
    return Component(name, type(build(False)), file.parent, "upscalers", checkpoint, file=file, build=build)


def _module(file: Path, upscaler: Upscaler, checkpoint: Checkpoint, data: bool) -> nn.Module:
    """Returns the module of a file, with its weights or with tensors without data in their place."""
    try:
        return upscaler.made(_read(file) if data else _blank(checkpoint)).eval().requires_grad_(False)
    except (DiffkilnError, MemoryError):
        raise
    except Exception as error:  # whatever an architecture raises for tensors that are not its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise source_error(f"{file.name} does not hold a whole upscaler: {reason}", "", ".file") from error


def _read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = load_file(file)
    names = plain_names(found)
    return {names[key]: tensor for key, tensor in found.items()}


def _blank(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(row.shape, dtype=getattr(torch, row.dtype), device="meta")
        for name, row in checkpoint.tensors.items()
    }
