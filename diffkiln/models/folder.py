"""A diffusers folder, looked at without loading a weight: its classes, its components, and what is wrong with it.

Classes come from diffusers, transformers and installed families alone. Code that comes with a model is never imported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkiln.errors import LimitExceeded, ManifestInvalid, Problem, SourceError
from diffkiln.interpreter.modular import INDEX, MODULAR_INDEX, as_ordinary, is_modular, plain_index
from diffkiln.interpreter.quiet import quiet_imports
from diffkiln.models.checkpoint import read_json
from diffkiln.models.components import Component, ComponentFiles, read_component, replaced_entry
from diffkiln.plugins import Plugin, plugins
from diffkiln.spec.problems import suggest

#: The component that looks at finished images.
CHECKER = "safety_checker"
#: Components that are part of a bundle only if the call reads them: they may serve a component that is left out.
IF_READ = ("feature_extractor",)
#: Components that judge or repeat images; they take no part in making one.
LEFT_OUT = (CHECKER,)


@dataclass(frozen=True)
class Wanted:
    """The choices of a spec about a folder's components.

    Attributes:
        pipeline: the class that is wanted in the place of the folder's own.
        variant: of the weights, where a component has them.
        given: components that are elsewhere, or None for one that the pipeline does without.
        omit: components that are left out, so that a notice says so.
        elsewhere: components whose weights are in other files.
        file: a file of another layout that has the weights of those that are not given.
    """

    pipeline: str | None = None
    variant: str | None = None
    given: Mapping[str, ComponentFiles | None] = field(default_factory=dict)
    omit: Collection[str] = ()
    elsewhere: Collection[str] = ()
    file: Path | None = None


@quiet_imports()
def read_folder(
    folder: Path, wanted: Wanted | None = None, *, weights: bool = True
) -> tuple[type, dict[str, Component], list[str]]:
    """Returns the pipeline class, the components that are used, and notices of those that are not.

    Without `weights`, modules need a configuration only.

    Raises:
        SourceError: with every problem that was found.
    """
    wanted = wanted or Wanted()
    index = read_index(folder)
    _refuse_code(folder, index)
    pipeline_class = _pipeline_class(index.get("_class_name"), index)
    if wanted.pipeline is not None:
        pipeline_class = _other_class(wanted.pipeline, pipeline_class, {**index, **_present(wanted)})
    _refuse_fetching(pipeline_class, index)
    components: dict[str, Component] = {}
    notices: list[str] = []
    problems = [*_unknown(wanted, pipeline_class, index), *_no_components(wanted, pipeline_class, index)]
    listed = {
        name: entry
        for name, entry in _listed(index, wanted)
        if _is_used(name, entry, wanted, pipeline_class) and not _is_made(name, folder, wanted, pipeline_class)
    }
    for name, entry in listed.items():
        if reason := _left_out(name, pipeline_class, listed, wanted):
            notices.append(f"{name} is left out: {reason}")
            continue
        try:
            components[name] = _component(folder, name, entry, wanted, weights=weights)
        except LimitExceeded:
            raise
        except (SourceError, ManifestInvalid) as error:
            if name in IF_READ:
                notices.append(f"{name} is left out: {error}")
                continue
            problems.append(Problem(_where(name, wanted), f"component {name}: {error}"))
    problems += _without_variant(components, wanted)
    notices += [part.quantized.notice(name) for name, part in components.items() if part.quantized]
    if problems:
        raise SourceError(problems=problems)
    return pipeline_class, components, notices


def _present(wanted: Wanted) -> dict[str, ComponentFiles]:
    return {name: files for name, files in wanted.given.items() if files is not None}


def _listed(index: Mapping[str, Any], wanted: Wanted) -> Iterator[tuple[str, list[Any]]]:
    """Yields the entries of model_index.json, then the components that only the spec has."""
    yield from entries(index)
    yield from ((name, [None, None]) for name in wanted.given if name not in index)


def _is_used(name: str, entry: list[Any], wanted: Wanted, pipeline_class: type) -> bool:
    if name in wanted.given:
        return wanted.given[name] is not None and name in _arguments(pipeline_class)
    return entry != [None, None] and (wanted.pipeline is None or name in _arguments(pipeline_class))


def _is_made(name: str, folder: Path, wanted: Wanted, pipeline_class: type) -> bool:
    """Returns True for an entry whose files diffusers neither saves nor loads: the pipeline makes the part itself."""
    _, optional = pipeline_class._get_signature_keys(pipeline_class)  # type: ignore[attr-defined]
    return name in optional and name not in wanted.given and not (folder / name).is_dir()


def _component(folder: Path, name: str, entry: list[Any], wanted: Wanted, *, weights: bool) -> Component:
    named = None if entry == [None, None] else (entry[0], entry[1])
    if index_of(folder) == MODULAR_INDEX and name not in wanted.given and not (folder / name).is_dir():
        raise SourceError(
            f"its files are not in the folder, since {MODULAR_INDEX} has them from elsewhere. Give it in the source: "
            f'"components": {{"{name}": {{"model": …, "subfolder": …}}}}, or null in its place to do without'
        )
    weights = weights and name not in wanted.elsewhere
    files = wanted.given.get(name)
    if files is None:
        return read_component(
            name, ComponentFiles((folder / name,), wanted.variant, wanted.file), named, weights=weights
        )
    if not files.folders:  # another file has the weights, and its configuration stays
        files = ComponentFiles((folder / name,), files.variant, files.file, files.origin)
        return read_component(name, files, named, weights=weights)
    return read_component(name, files, replaced_entry(files, named), weights=weights)


def _where(name: str, wanted: Wanted) -> str:
    return f"$.source.components.{name}" if name in wanted.given else "$.source"


def _unknown(wanted: Wanted, pipeline_class: type, index: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields what the spec says of components that the pipeline has not."""
    taken = _arguments(pipeline_class)
    for name in wanted.given:
        if name not in taken:
            reason = f"{pipeline_class.__name__} has no component {name!r}; it takes {', '.join(taken)}"
            yield Problem(f"$.source.components.{name}", reason, suggest(name, taken))
    for position, name in enumerate(wanted.omit):
        if index.get(name, [None, None]) == [None, None] and wanted.given.get(name) is None:
            yield Problem(f"$.source.omit[{position}]", f"this {pipeline_class.__name__} has no {name}", "Remove it")


def _no_components(wanted: Wanted, pipeline_class: type, index: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields what stands for a component that the pipeline needs, and is none."""
    for name, parameter in _arguments(pipeline_class).items():
        value = index.get(name)
        if parameter.default is parameter.empty and isinstance(value, list) and not is_entry(value):
            yield Problem(_where(name, wanted), f"component {name}: {value} names no library and class")


def _without_variant(components: Mapping[str, Component], wanted: Wanted) -> Iterator[Problem]:
    """Yields a problem if no component has weights of the variant that is asked for."""
    modules = [part for part in components.values() if part.library and part.name not in wanted.given and not part.file]
    parts = [member for part in modules for member in (part.members or (part,))]
    if wanted.variant and not any(part.variant for part in parts):
        hint = "Remove it, or give one that the model has"
        yield Problem("$.source.variant", f"no component has weights of the variant {wanted.variant!r}", hint)


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuses code that diffusers would load beside model_index.json, as `pipeline_loading_utils` looks for it."""
    named = index["_class_name"] if isinstance(index["_class_name"], list) else []
    for name in ("None", *map(str, named)):  # the first is what no custom pipeline is called
        if (folder / f"{Path(name).name}.py").exists():
            raise source_error(f"the model brings its own code ({name}.py), which is never run", "Remove the file")


def source_error(reason: str, hint: str = "", where: str = "$.source.model") -> SourceError:
    return SourceError(problems=[Problem(where, reason, hint)])


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / index_of(folder)
    if not path.is_file():
        found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        if not found:
            raise source_error(f"the folder {folder.name} is empty", "Download the model again")
        listing = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
        raise source_error(
            f"the folder {folder.name} is not a diffusers pipeline: it has no model_index.json, but {listing}",
            "Give the folder that pipeline.save_pretrained writes",
        )
    try:
        index = read_json(path)
    except SourceError as error:
        raise source_error(f"{error}", "Download the model again") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise source_error(f"{path.name} names no pipeline class", "Download the model again")
    return plain_index(index)


def index_of(folder: Path) -> str:
    """Returns the name of the file that lists the folder's components: a modular pipeline may have its own."""
    return MODULAR_INDEX if (folder / MODULAR_INDEX).is_file() and not (folder / INDEX).is_file() else INDEX


def entries(index: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yields the components of model_index.json; other entries are arguments of the pipeline."""
    for name, entry in index.items():
        if not name.startswith("_") and is_entry(entry):
            yield name, entry


def is_entry(value: Any) -> bool:
    """Returns True for library and class of a component, or their absence; a list of numbers is an argument."""
    listed = isinstance(value, list) and len(value) == 2
    return listed and all(item is None or isinstance(item, str | bool) for item in value)


def _pipeline_class(name: Any, index: Mapping[str, Any]) -> type:
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not isinstance(name, str):
        raise source_error(
            f"model_index.json asks for its own pipeline class ({json.dumps(name)})",
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
    if is_modular(kind) and getattr(kind, "default_blocks_name", None) is None:
        raise source_error(f"{name} does not say which blocks it has", "Give a modular pipeline of a class of its own")
    kind = as_ordinary(kind, index)
    if not issubclass(kind, DiffusionPipeline):
        raise source_error(f"{name} is a class of diffusers, but not a pipeline")
    return kind


def _refuse_fetching(kind: type, index: Mapping[str, Any]) -> None:
    """Refuses a folder whose missing components diffusers would fetch from the pipelines that its model card names."""
    needed = [name for name, parameter in _arguments(kind).items() if parameter.default is parameter.empty]
    missing = [name for name in needed if index.get(name) in (None, [None, None])]
    if kind._load_connected_pipes and missing:  # type: ignore[attr-defined]
        raise source_error(
            f"{kind.__name__} has diffusers fetch the pipelines that it is made of, here for {', '.join(missing)}",
            "Give the folder that pipeline.save_pretrained writes, or compile each pipeline by itself",
        )


def _of_a_family(name: str) -> type | None:
    """Returns the class of a pipeline that diffusers lacks and a family of an installed package brings."""
    for family in plugins("families").values():
        for reference in family.load().pipelines:
            if reference.endswith(f":{name}"):
                return Plugin(name, reference, family.distribution).load()
    return None


def _other_class(name: str, own: type, index: Mapping[str, Any]) -> type:
    """Returns the class that a spec names, if the folder has every component that it needs."""
    where = "$.source.pipeline"
    try:
        kind = _pipeline_class(name, {})
    except SourceError as error:
        raise source_error(f"{error}", "Give the name of a pipeline class of diffusers", where) from error
    needed = [name for name, parameter in _arguments(kind).items() if parameter.default is parameter.empty]
    lacking = [name for name in needed if name not in index and name not in (*LEFT_OUT, *IF_READ)]
    if lacking:
        hint = f"Save a {name} with all its components, and give its folder as the model"
        raise source_error(f"{name} needs {', '.join(lacking)}, which this {own.__name__} does not have", hint, where)
    return kind


def _arguments(pipeline_class: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    return {item.name: item for item in parameters if item.name != "self" and item.kind is not item.VAR_KEYWORD}


def _left_out(name: str, pipeline_class: type, listed: Collection[str], wanted: Wanted) -> str:
    if name in wanted.omit:
        return "the spec omits it"
    if name == CHECKER and wanted.file is not None and name not in wanted.given:
        return "a single file does not hold it, so that diffusers loads none. Give it in the source's components"
    call = inspect.signature(getattr(pipeline_class, "__call__")).parameters  # noqa: B004, B009
    if name == "image_encoder" and "image" not in call and "ip_adapter_image" in call:
        return "only IP adapters use it"
    return ""
