"""Components that a pipeline does not have and a pass adds: models that are given its finished pictures.

Such a model is a folder of diffusers' or transformers' format, or one file of an upscaler whose architecture is known
by its tensors (diffkiln.models.upscalers). No code comes with it: classes are those of both libraries and of plug-ins.

What it does stands here once, for the meta model that is recorded and for the original that a bundle is compared with:
the pipeline's own call, asked for tensors, and then the model on its pictures.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from diffkiln.errors import DiffkilnError, RecordError, SourceError
from diffkiln.models.components import Component
from diffkiln.program.calls import PICTURES

#: Pictures, [batch, channels, height, width], and frames, [batch, frames, channels, height, width].
_PICTURES, _FRAMES, _COLOURS = 4, 5, 3
_OUTPUT, _ADDED = "output_type", "_diffkiln_added"


@dataclass(frozen=True, eq=False)
class Added:
    """A model that is given a pipeline's finished pictures.

    Attributes:
        component: its files and its class.
        signed: whether it takes and gives pictures from -1 to 1, and not from 0 to 1.
        origin: what identifies it apart from its digest: a repository and its commit.
    """

    component: Component
    signed: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.component.name

    @cached_property
    def digest(self) -> str:
        """Returns "sha256:…" of its file, or over path, size and SHA-256 of each file of its folder."""
        if self.component.file is not None:
            return f"sha256:{_hashed(self.component.file)[1]}"
        own = sorted(file.partition("/")[2] for file in self.component.files())
        rows = [[file, *_hashed(self.component.root / file)] for file in own]
        return "sha256:" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def draw(self, module: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
        """Returns what the model makes of finished pictures, or of frames one after the other.

        Args:
            module: the model, with its weights or as a meta model.
            pictures: from 0 to 1, [batch, 3, height, width], or [batch, frames, 3, height, width].

        Raises:
            RecordError: it does not make pictures of them; says what it does.
        """
        if pictures.ndim == _FRAMES:
            return torch.stack([self._drawn(module, frame) for frame in pictures.unbind(1)], 1)
        return self._drawn(module, pictures)

    def _drawn(self, module: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
        given = pictures.to(_dtype_of(module))
        made = self._called(module, given * 2 - 1 if self.signed else given)
        made = made / 2 + 0.5 if self.signed else made
        return made.clamp(0, 1).to(pictures.dtype)

    def _called(self, module: nn.Module, given: torch.Tensor) -> torch.Tensor:
        who, size = f"{self.name} ({type(module).__name__})", " x ".join(map(str, given.shape))
        try:
            result = module(given)
        except (DiffkilnError, MemoryError):
            raise
        except Exception as error:  # whatever a model raises for what is none of its inputs
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RecordError(f"{who} takes no pictures of {size}: {type(error).__name__}: {reason}") from error
        made = next((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)), None)
        if made is None or made.ndim != _PICTURES or made.shape[:2] != (given.shape[0], _COLOURS):
            gives = "no tensor" if made is None else f"a tensor of {' x '.join(map(str, made.shape))}"
            raise RecordError(f"{who} makes no pictures: of {size} it gives {gives}")
        return made


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the type that a model computes in: that of its first weight which is no number of a byte."""
    types = (tensor.dtype for tensor in module.parameters() if tensor.is_floating_point() and tensor.itemsize > 1)
    return next(types, torch.float32)


def _hashed(path: Path) -> tuple[int, str]:
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror}") from error


# -- the pipeline --


def finishing(pipe: Any, added: Mapping[str, tuple[Added, nn.Module]]) -> Any:
    """Makes the calls of a pipeline end with models that work on its pictures, and returns it.

    They are among its components, and it is of a class of its own, of the same name.

    Args:
        pipe: of diffusers.
        added: the models by name, in the order in which they are called.
    """
    kind, modules = type(pipe), {name: module for name, (_, module) in added.items()}

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        form = keywords.get(_OUTPUT, _default_form(kind))
        if form == "latent":
            return kind.__call__(self, *args, **keywords)
        result = kind.__call__(self, *args, **{**keywords, _OUTPUT: "pt"})
        return _with_pictures(result, lambda pictures: _in_form(_finished(pictures, added), form), kind)

    def to(self: Any, *args: Any, **keywords: Any) -> Any:
        for module in modules.values():
            module.to(*args, **keywords)
        return kind.to(self, *args, **keywords)

    components = property(lambda self: {**kind.components.fget(self), **modules})
    own = {"__call__": call, "to": to, "components": components, _ADDED: frozenset(modules)}
    pipe.__class__ = type(kind.__name__, (kind,), own)
    return pipe


def added_to(pipe: Any) -> frozenset[str]:
    """Returns the names of the models that the calls of a pipeline end with."""
    return getattr(pipe, _ADDED, frozenset())


def _default_form(kind: type) -> str:
    parameter = inspect.signature(getattr(kind, "__call__")).parameters.get(_OUTPUT)  # noqa: B004, B009
    return str(parameter.default) if parameter else "pt"


@torch.no_grad()
def _finished(pictures: Any, added: Mapping[str, tuple[Added, nn.Module]]) -> torch.Tensor:
    for each, module in added.values():
        pictures = each.draw(module, pictures)
    return pictures


def _with_pictures(result: Any, change: Callable[[torch.Tensor], Any], kind: type) -> Any:
    """Returns what a call gives, a tuple or an output of diffusers, with its pictures changed."""
    if isinstance(result, tuple):
        return change(_checked(result[0], "its first result", kind)), *result[1:]
    name = next((name for name in PICTURES if name in result), "")
    result[name or next(iter(result))] = change(_checked(result.get(name), ", ".join(result), kind))
    return result


def _checked(pictures: Any, given: str, kind: type) -> torch.Tensor:
    colours = isinstance(pictures, torch.Tensor) and pictures.ndim in (_PICTURES, _FRAMES)
    if not colours or pictures.shape[-3] != _COLOURS:
        shape = f" of {' x '.join(map(str, pictures.shape))}" if isinstance(pictures, torch.Tensor) else ""
        raise RecordError(
            f"{kind.__name__} makes no pictures of three colours ({given}{shape}), so nothing follows them"
        )
    return pictures


def _in_form(pictures: torch.Tensor, form: str) -> Any:
    if form == "pt":
        return pictures
    from diffusers.image_processor import VaeImageProcessor

    arrays = pictures.cpu().movedim(-3, -1).float().numpy()
    if form == "np":
        return arrays
    to_pil: Any = VaeImageProcessor.numpy_to_pil
    return [to_pil(each) for each in arrays] if arrays.ndim == _FRAMES else to_pil(arrays)
