"""A diffusers folder, looked at without loading a weight: its classes, its components, and what is wrong with it.

Classes come from diffusers, transformers and installed families alone. Code that comes with a model is never imported.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from diffkiln.bundle.configurations import fetches_code, is_configuration, reaching_out
from diffkiln.bundle.layout import PIPELINE, misplaced
from diffkiln.errors import LimitExceeded, ManifestInvalid, Problem, SourceError
from diffkiln.guards.building import check_config
from diffkiln.guards.limits import active
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.interpreter.quiet import quiet_imports
from diffkiln.models.checkpoint import Checkpoint, Library, read_checkpoint, read_json
from diffkiln.plugins import Plugin, plugins

#: Components that judge or repeat images; they take no part in making one.
LEFT_OUT = ("safety_checker", "feature_extractor")
_SCHEDULER = "scheduler_config.json"
_CONFIGS = ("config.json", _SCHEDULER, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, eq=False)
class Component:
    """One entry of model_index.json: its class and, for a module, the library that loads it and its weights."""

    name: str
    kind: type
    library: Library | None = None
    checkpoint: Checkpoint | None = None


@quiet_imports()
def read_folder(
    folder: Path, *, weights: bool = True, elsewhere: Collection[str] = (), pipeline: str | None = None
) -> tuple[type, dict[str, Component], list[str]]:
    """The pipeline class, the components that are used, and notices of those that are not.

    Without `weights`, modules need a configuration only; so do those whose weights are `elsewhere`. `pipeline` is the
    class that is wanted in the place of the folder's own.

    Raises:
        SourceError: with every problem that was found.
    """
    index = read_index(folder)
    _refuse_code(folder, index)
    pipeline_class = _pipeline_class(index.get("_class_name"))
    if pipeline is not None:
        pipeline_class = _other_class(pipeline, pipeline_class, index)
    components: dict[str, Component] = {}
    notices: list[str] = []
    problems: list[Problem] = []
    for name, entry in entries(index):
        if entry == [None, None] or (pipeline is not None and name not in _arguments(pipeline_class)):
            continue
        if reason := _left_out(name, pipeline_class):
            notices.append(f"{name} is left out: {reason}")
            continue
        try:
            components[name] = _component(folder, name, *entry, weights=weights and name not in elsewhere)
        except LimitExceeded:
            raise
        except (SourceError, ManifestInvalid) as error:
            problems.append(Problem("$.source", f"component {name}: {error}"))
    if problems:
        raise SourceError(problems=problems)
    return pipeline_class, components, notices


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse code that diffusers would take beside model_index.json, as `pipeline_loading_utils` looks for it."""
    named = index["_class_name"] if isinstance(index["_class_name"], list) else []
    for name in ("None", *map(str, named)):  # the first is what no custom pipeline is called
        if (folder / f"{Path(name).name}.py").exists():
            raise source_error(f"the model brings code of its own ({name}.py), which is never run", "Remove the file")


def _refuse_reaching_out(file: Path) -> None:
    try:
        found = reaching_out(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the file says so
    if found:
        raise SourceError(f"{file.name}: {found}")


def source_error(reason: str, hint: str = "", where: str = "$.source.model") -> SourceError:
    return SourceError(problems=[Problem(where, reason, hint)])


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        if not found:
            raise source_error(f"the folder {folder.name} is empty", "Download the model again")
        listing = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
        raise source_error(
            f"the folder {folder.name} is no diffusers pipeline: it has no model_index.json, but {listing}",
            "Give the folder that pipeline.save_pretrained writes",
        )
    try:
        index = read_json(path)
    except SourceError as error:
        raise source_error(f"{error}", "Download the model again") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise source_error("model_index.json names no pipeline class", "Download the model again")
    return index


def entries(index: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The components of model_index.json; other entries are arguments of the pipeline."""
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2:
            yield name, entry


def _pipeline_class(name: Any) -> type:
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not isinstance(name, str):
        raise source_error(
            f"model_index.json asks for a pipeline class of its own ({json.dumps(name)})",
            "Code that comes with a model is never run: use a pipeline class of diffusers",
        )
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    kind = kind or _of_a_family(name)
    if not inspect.isclass(kind):
        raise source_error(
            f"diffusers {diffusers.__version__}, which is installed, has no class {name!r}",
            "Install the version that the model was saved with or a later one",
        )
    if kind.__module__.startswith("diffusers.utils.dummy"):
        needs = ", ".join(getattr(kind, "_backends", ()))
        raise source_error(f"the pipeline {name} needs packages that are not installed", f"Install {needs}")
    if not issubclass(kind, DiffusionPipeline):
        raise source_error(f"{name} is a class of diffusers, but not a pipeline")
    if kind._load_connected_pipes:
        raise source_error(f"{name} has diffusers fetch the pipelines that it is made of", "Compile each by itself")
    return kind


def _of_a_family(name: str) -> type | None:
    """Returns the class of a pipeline that diffusers lacks and a family of an installed package brings."""
    for family in plugins("families").values():
        for place in family.load().pipelines:
            if place.endswith(f":{name}"):
                return Plugin(name, place, family.distribution).load()
    return None


def _other_class(name: str, own: type, index: Mapping[str, Any]) -> type:
    """The class that a spec names, if the components are all that it needs."""
    where = "$.source.pipeline"
    try:
        kind = _pipeline_class(name)
    except SourceError as error:
        raise source_error(f"{error}", "Give the name of a pipeline class of diffusers", where) from error
    needed = [name for name, parameter in _arguments(kind).items() if parameter.default is parameter.empty]
    lacking = [name for name in needed if name not in index and name not in LEFT_OUT]
    if lacking:
        hint = f"Save a {name} with all its components, and give its folder as the model"
        raise source_error(f"{name} needs {', '.join(lacking)}, which this {own.__name__} does not have", hint, where)
    return kind


def _arguments(pipeline_class: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    return {item.name: item for item in parameters if item.name != "self" and item.kind is not item.VAR_KEYWORD}


def _left_out(name: str, pipeline_class: type) -> str:
    if name in LEFT_OUT:
        return "it checks finished images and is not compiled"
    call = inspect.signature(getattr(pipeline_class, "__call__")).parameters  # noqa: B004, B009
    if name == "image_encoder" and "image" not in call and "ip_adapter_image" in call:
        return "only IP adapters use it"
    return ""


def _component(folder: Path, name: str, library: Any, class_name: Any, *, weights: bool) -> Component:
    if not name.isidentifier():
        raise SourceError("the name is no identifier")
    root = folder / name
    if not root.is_dir():
        raise SourceError(f"the folder {name} is missing. Download the model again")
    kind = _component_class(library, class_name)
    if code := sorted(path.name for path in root.rglob("*.py")):
        raise SourceError(f"the model brings code of its own ({code[0]}), which is never run")
    module_library = _module_library(kind)
    for file in sorted(path for path in root.rglob("*.json") if is_configuration(path.name)):
        _refuse_reaching_out(file)
    if fetches_code(kind):
        raise SourceError(f"{class_name} takes code or a model from elsewhere, which is never run")
    configs = {file: read_json(root / file) for file in _CONFIGS if (root / file).is_file()}
    for file in ("config.json", _SCHEDULER):
        check_config(configs.get(file), f"{name}/{file}", scheduler=file == _SCHEDULER)
    if module_library is None:
        _check_tokenizers(root)
        return Component(name, kind)
    config = configs.get("config.json")
    if not isinstance(config, dict):
        raise SourceError("config.json is missing or is no JSON object")
    if config.get("quantization_config"):
        raise SourceError(
            "the weights are quantized already. Give the model that they were quantized from, "
            "and let the pass `quantize` do it"
        )
    return Component(name, kind, module_library, read_checkpoint(root, module_library) if weights else None)


def _check_tokenizers(root: Path) -> None:
    """Reads tokenizers within limits before a library reads them without."""
    for path in root.rglob("tokenizer.json"):
        active().check("json_bytes", path.stat().st_size, path.name)
        BoundedTokenizer(path.read_bytes(), path.name)


def _component_class(library: Any, class_name: Any) -> type:
    """The class that diffusers would load, if it is one of diffusers or transformers."""
    import diffusers
    import transformers

    if not (isinstance(library, str) and isinstance(class_name, str) and class_name.isidentifier()):
        raise SourceError(f"model_index.json says {json.dumps([library, class_name])}, which is no library and class")
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, library, None)
    if not isinstance(home, ModuleType):
        raise SourceError(
            f"the class {class_name} is of {library!r}, neither of diffusers nor of transformers; "
            "code that comes with a model is never run"
        )
    if re.match("Auto[A-Z]", class_name):
        raise SourceError(f"{class_name} is no class of its own, but lets the model's files choose one")
    kind = getattr(home, class_name, None)
    if not inspect.isclass(kind):
        version = getattr(homes.get(library, diffusers), "__version__", "")
        owner = library if library in homes else "diffusers"
        raise SourceError(f"{owner} {version}, which is installed, has no class {class_name!r}")
    if ".dummy_" in kind.__module__:
        raise SourceError(f"the class {class_name} needs packages that are not installed")
    return kind


def _module_library(kind: type) -> Library | None:
    import torch
    import transformers
    from diffusers.models.modeling_utils import ModelMixin

    if issubclass(kind, ModelMixin):
        return "diffusers"
    if issubclass(kind, transformers.PreTrainedModel):
        return "transformers"
    if issubclass(kind, torch.nn.Module):
        raise SourceError(f"{kind.__name__} is a module that neither diffusers nor transformers loads")
    return None


def plain_files(root: Path) -> list[Path]:
    """What a tokenizer or a scheduler may read, and a bundle may hold: no dot files, pickles or code."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in files if not misplaced(f"{PIPELINE}{path.relative_to(root).as_posix()}", "config")]
