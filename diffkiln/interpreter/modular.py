"""Modular pipelines of diffusers as ordinary ones.

A `ModularPipeline` is a sequence of blocks over a state: its call takes any keyword and gives the whole state. The
class that `as_ordinary` makes of it has a signature, components and results as every `DiffusionPipeline` has, and its
call runs the original's blocks.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffkiln.interpreter.quiet import quiet_libraries

#: The file that has the components of a modular pipeline, and that of an ordinary one.
MODULAR_INDEX, INDEX = "modular_model_index.json", "model_index.json"
#: Results of blocks that a call gives where it is not asked for others, and what ordinary pipelines call them.
_RESULTS = {
    "images": "images", "videos": "frames", "frames": "frames", "audio": "audio", "audios": "audios", "sound": "audio",
}  # fmt: skip


def is_modular(kind: Any) -> bool:
    """Returns True for a class of a modular pipeline."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

    return inspect.isclass(kind) and issubclass(kind, ModularPipeline)


def as_ordinary(kind: Any, index: Mapping[str, Any]) -> Any:
    """Returns the class itself, or of a modular pipeline the class that stands for it.

    Args:
        kind: a class of diffusers.
        index: what the folder's index holds, which may name the blocks.
    """
    if not is_modular(kind):
        return kind
    return _ordinary(kind, _blocks_class(kind, index.get("_blocks_class_name")))


def original_of(pipe: Any) -> Any:
    """Returns the modular pipeline that an instance of a class of `as_ordinary` runs, or the pipeline itself."""
    return pipe.modular if isinstance(pipe, _Ordinary) else pipe


def ordinary_of(pipe: Any) -> Any:
    """Returns the ordinary pipeline that `original_of` was asked for, or the pipeline itself."""
    return vars(pipe).get("owner", pipe)


def blocks_of(pipe: Any) -> Iterator[Any]:
    """Yields the blocks that an ordinary pipeline runs, those within others too."""
    if isinstance(pipe, _Ordinary):
        yield from _every_block(pipe.modular._blocks)


def plain_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a modular index holds as an ordinary one says it: library and class of each component."""
    return {name: _entry(*value) if _is_component(value) else value for name, value in index.items()}


def _entry(library: Any, name: Any, origin: Mapping[str, Any]) -> list[Any]:
    """Returns library and class of a component: those of the one that was saved, else those that are wanted."""
    wanted = origin.get("type_hint")
    if name is None and origin.get("pretrained_model_name_or_path") and isinstance(wanted, list) and len(wanted) == 2:
        return wanted
    return [library, name]


def _is_component(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[2], Mapping)


def _blocks_class(kind: Any, name: Any) -> type:
    """Returns the blocks that an index names, if they are blocks of diffusers; else the pipeline's own, as diffusers
    does."""
    import diffusers
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks

    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if inspect.isclass(found) and issubclass(found, ModularPipelineBlocks) and getattr(found, "block_classes", None):
        return found
    return getattr(diffusers, kind.default_blocks_name)


class _Ordinary:
    """The part of an ordinary pipeline that runs blocks.

    Attributes:
        modular: the original, with the same components.
    """

    modular: Any

    @classmethod
    def load_config(cls, folder: Any, **options: Any) -> Any:
        """Reads the index of a folder, a modular one where there is no other."""
        file = Path(folder) / MODULAR_INDEX
        if not file.is_file() or (file.parent / INDEX).is_file():
            return super().load_config(folder, **options)  # type: ignore[misc]
        return plain_index(json.loads(file.read_text(encoding="utf-8")))

    def set_progress_bar_config(self, **options: Any) -> None:
        """Sets the progress bars of all blocks."""
        for block in _every_block(self.modular._blocks):
            if hasattr(block, "progress_bar"):
                block.set_progress_bar_config(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "modular" in vars(self) and name in self.modular._component_specs:
            setattr(self.modular, name, value)


@cache
def _ordinary(kind: Any, blocks: Any) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with quiet_libraries():
        sample = kind(blocks=blocks())
    names = list(sample.pretrained_component_names)
    settings = {name: spec.default for name, spec in sample._config_specs.items()}
    inside = _inside(kind)

    def __init__(self: Any, **given: Any) -> None:
        DiffusionPipeline.__init__(self)
        parts = {name: given.get(name) for name in names}
        set_to = {name: given.get(name, default) for name, default in settings.items()}
        self.register_modules(**parts)
        self.register_to_config(**set_to, _blocks_class_name=blocks.__name__)
        with quiet_libraries():
            modular = inside(blocks=blocks())
            modular.update_components(**{name: part for name, part in parts.items() if part is not None}, **set_to)
        modular.owner = self
        self.modular = modular

    def __call__(self: Any, *, output: str | list[str] | None = None, **given: Any) -> dict[str, Any]:
        wanted = [output] if isinstance(output, str) else list(output or _results(self.modular))
        with _errors_raised_only():
            found = self.modular(output=wanted, **given)
        return {_RESULTS.get(name, name): found[name] for name in wanted}

    _sign(__init__, [*_components(sample, names), *(_keyword(name, value) for name, value in settings.items())])
    _sign(__call__, [*_inputs(sample), _keyword("output", _results(sample), str | list[str])])
    members = {"__init__": __init__, "__call__": __call__, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Ordinary, DiffusionPipeline), members | {"_optional_components": names})


@contextmanager
def _errors_raised_only() -> Iterator[None]:
    """Keeps blocks from writing each error, with its traceback, once for every block around the one that fails."""
    log = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _inside(kind: Any) -> Any:
    """Returns the class of the original within an ordinary pipeline: it runs where that one runs."""

    def device(self: Any) -> torch.device:
        return self.owner._execution_device if "owner" in vars(self) else kind._execution_device.fget(self)

    return type(kind.__name__, (kind,), {"_execution_device": property(device), "__module__": kind.__module__})


def _sign(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    function.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]


def _keyword(name: str, default: Any = None, annotation: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _components(sample: Any, names: list[str]) -> Iterator[inspect.Parameter]:
    """Yields a parameter for each component; those that blocks need whatever they are given have no default."""
    needed = {spec.name for spec in _unconditional(sample._blocks)}
    for name in names:
        yield _keyword(name, inspect.Parameter.empty if name in needed else None)


def _unconditional(blocks: Any) -> list[Any]:
    """Returns the components of the blocks that run if no input chooses others."""
    try:
        found = blocks.get_execution_blocks()
    except (NotImplementedError, ValueError, AttributeError):
        return []
    return list(found.expected_components) if found is not None else []


def _inputs(sample: Any) -> Iterator[inspect.Parameter]:
    """Yields a parameter for each input of the blocks. None is required: which ones are, the other inputs decide."""
    seen = set()
    for item in sample._blocks.inputs:
        if isinstance(item.name, str) and item.name.isidentifier() and item.name not in seen:
            seen.add(item.name)
            yield _keyword(item.name, item.default, item.type_hint or inspect.Parameter.empty)


def _results(modular: Any) -> list[str]:
    """Returns the results that a call gives by itself: pictures and sound, else the last."""
    made = [item.name for item in modular._blocks.outputs]
    return [name for name in made if name in _RESULTS] or made[-1:]


def _every_block(blocks: Any) -> Iterator[Any]:
    yield blocks
    for inner in getattr(blocks, "sub_blocks", {}).values():
        yield from _every_block(inner)
