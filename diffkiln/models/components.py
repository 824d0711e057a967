"""One component of a diffusers pipeline, looked at without loading a weight: its class, its files, what is wrong.

Classes come from diffusers and transformers alone. Code that comes with a model is never imported.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from diffkiln.bundle.bags import BAGS, bag_of, member_folder
from diffkiln.bundle.configurations import fetches_code, is_configuration, reaching_out
from diffkiln.bundle.layout import PIPELINE, misplaced
from diffkiln.errors import SourceError
from diffkiln.guards.building import check_config
from diffkiln.guards.limits import active
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.models.checkpoint import Checkpoint, Library, has_variant, read_checkpoint, read_json
from diffkiln.models.quantized import QuantizedLayers, plain, read_layers
from diffkiln.models.single_file import is_read_from, read_single_file

_SCHEDULER = "scheduler_config.json"
_CONFIGS = ("config.json", _SCHEDULER, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ComponentFiles:
    """The files of a component that a spec names: its folder, or one for each model of a bag.

    Attributes:
        folders: with the configuration.
        variant: of the weights, such as "fp16", where there is one.
        file: a file of another layout that has the weights.
        origin: what identifies each folder apart from its digest: the repository and its commit.
    """

    folders: tuple[Path, ...]
    variant: str | None = None
    file: Path | None = None
    origin: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, eq=False)
class Component:
    """One entry of model_index.json.

    Attributes:
        name, kind: its name in the pipeline, and its class.
        root: the folder of its configuration.
        library: that loads it, if it is a module.
        checkpoint: its weights; those of all members of a bag.
        variant: of the weights that are read.
        file: a file of another layout that has the weights.
        members: the models of a bag, each named as its folder is.
        quantized: its layers that are quantized already; `checkpoint` has the other weights, and `saved` has all.
        build: makes the module where no library has its class, with its weights or without data; all is in `file`.
    """

    name: str
    kind: type
    root: Path
    library: Library | None = None
    checkpoint: Checkpoint | None = None
    variant: str | None = None
    file: Path | None = None
    members: tuple[Component, ...] = ()
    quantized: QuantizedLayers | None = None
    saved: Checkpoint | None = None
    build: Callable[[bool], Any] | None = None

    def folders(self) -> dict[str, Path]:
        """Returns the folders of its files, by the names that they have in a pipeline."""
        return {member.name: member.root for member in self.members} or {self.name: self.root}

    def files(self) -> Iterator[str]:
        """Yields every file that is used, weights included: the name of a folder, `/`, and the path in it."""
        if self.members:
            for member in self.members:
                yield from member.files()
        elif self.build:
            return
        elif self.library:
            weights = self.checkpoint.files if self.checkpoint and not self.file else ()
            yield from (f"{self.name}/{file}" for file in ("config.json", *weights))
        else:
            yield from (f"{self.name}/{path.relative_to(self.root).as_posix()}" for path in plain_files(self.root))


def read_component(name: str, files: ComponentFiles, entry: tuple[Any, Any] | None, *, weights: bool) -> Component:
    """Returns a component, of which no weight is read.

    Args:
        name: in the pipeline.
        files: where its files are.
        entry: library and class that model_index.json names; None if it has none, and the files must say.
        weights: whether it must have some.

    Raises:
        SourceError: what is wrong with it.
    """
    if not name.isidentifier():
        raise SourceError("the name is not an identifier")
    library, class_name = entry or _stated_class(files.folders)
    kind = _component_class(library, class_name)
    bag = BAGS.get(kind.__name__)
    if bag is None and len(files.folders) > 1:
        raise SourceError(f"{kind.__name__} is one model, and {len(files.folders)} are given")
    if bag is None:
        return _one(name, files, kind, weights=weights)
    return _bag(name, files, kind, weights=weights)


def _bag(name: str, files: ComponentFiles, kind: type, *, weights: bool) -> Component:
    """Returns a bag of models, whose folders lie beside each other or are given."""
    bag, folders = BAGS[kind.__name__], list(files.folders)
    if len(folders) == 1:
        beside = folders[0]
        while (following := beside.parent / member_folder(kind.__name__, beside.name, len(folders))).is_dir():
            folders.append(following)
    member_class = _component_class("diffusers", bag.member)
    members = [
        _one(
            member_folder(kind.__name__, name, index), replace(files, folders=(folder,)), member_class, weights=weights
        )
        for index, folder in enumerate(folders)
    ]
    tensors = {
        f"{bag.attribute}.{index}.{key}": tensor
        for index, member in enumerate(members)
        for key, tensor in (member.checkpoint.tensors if member.checkpoint else {}).items()
    }
    checkpoint = Checkpoint((), tensors) if weights else None
    return Component(name, kind, members[0].root, "diffusers", checkpoint, files.variant, members=tuple(members))


def _one(name: str, files: ComponentFiles, kind: type, *, weights: bool) -> Component:
    root = files.folders[0]
    if not root.is_dir():
        raise SourceError(f"the folder {root.name} is missing. Download the model again")
    if code := sorted(path.name for path in root.rglob("*.py")):
        raise SourceError(f"the model brings its own code ({code[0]}), which is never run")
    module_library = _module_library(kind)
    for file in sorted(path for path in root.rglob("*.json") if is_configuration(path.name)):
        _refuse_reaching_out(file)
    if fetches_code(kind):
        raise SourceError(f"{kind.__name__} takes code or a model from elsewhere, which is never run")
    configs = {file: read_json(root / file) for file in _CONFIGS if (root / file).is_file()}
    for file in ("config.json", _SCHEDULER):
        check_config(configs.get(file), f"{name}/{file}", scheduler=file == _SCHEDULER)
    if module_library is None:
        _check_tokenizers(root)
        return Component(name, kind, root)
    config = configs.get("config.json")
    if not isinstance(config, dict):
        raise SourceError("config.json is missing or is not a JSON object")
    if files.file is not None and weights and is_read_from(kind, files.file):
        checkpoint = read_single_file(name, kind, root, files.file)
        return Component(name, kind, root, module_library, checkpoint, file=files.file)
    variant = files.variant if has_variant(root, module_library, files.variant) else None
    checkpoint = read_checkpoint(root, module_library, variant) if weights else None
    found = Component(name, kind, root, module_library, checkpoint, variant)
    stated = config.get("quantization_config")
    if not stated or checkpoint is None:
        return found
    layers = read_layers(stated if isinstance(stated, dict) else {}, checkpoint, root)
    return replace(found, checkpoint=plain(checkpoint, layers), quantized=layers, saved=checkpoint)


def _refuse_reaching_out(file: Path) -> None:
    try:
        found = reaching_out(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the file says so
    if found:
        raise SourceError(f"{file.name}: {found}")


def _check_tokenizers(root: Path) -> None:
    """Reads tokenizers within limits before a library reads them without."""
    for path in root.rglob("tokenizer.json"):
        active().check("json_bytes", path.stat().st_size, path.name)
        BoundedTokenizer(path.read_bytes(), path.name)


def _stated_class(folders: tuple[Path, ...]) -> tuple[str, str]:
    """Returns library and class of a component that model_index.json does not have, as its configuration names it."""
    root = folders[0]
    for file in ("config.json", _SCHEDULER):
        config = read_json(root / file) if (root / file).is_file() else None
        if not isinstance(config, dict):
            continue
        if isinstance(named := config.get("_class_name"), str):
            together = bag_of(named) if len(folders) > 1 else named
            if together is None:
                raise SourceError(f"{named} is one model, and {len(folders)} are given")
            return "diffusers", together
        if isinstance(named := config.get("architectures"), list) and len(named) == 1:
            return "transformers", str(named[0])
    raise SourceError(f"the folder {root.name} does not say of which class it is")


def replaced_entry(files: ComponentFiles, entry: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
    """Returns library and class of a component that a spec replaces.

    They are those that the new files name, as diffusers' own do; else those that the component had.
    """
    first, *others = files.folders
    if others:
        return None
    for file in ("config.json", _SCHEDULER):
        config = read_json(first / file) if (first / file).is_file() else None
        if isinstance(config, dict) and isinstance(named := config.get("_class_name"), str):
            return entry if entry and entry[1] == named else ("diffusers", named)
    return entry


def _component_class(library: Any, class_name: Any) -> type:
    """Returns the class that diffusers would load, if it is one of diffusers or transformers."""
    import diffusers
    import transformers

    if not (isinstance(library, str) and isinstance(class_name, str) and class_name.isidentifier()):
        raise SourceError(
            f"model_index.json says {json.dumps([library, class_name])}, which is not a library and class"
        )
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, library, None)
    if not isinstance(home, ModuleType):
        raise SourceError(
            f"the class {class_name} is of {library!r}, neither of diffusers nor of transformers; "
            "code that comes with a model is never run"
        )
    if re.match("Auto[A-Z]", class_name):
        raise SourceError(f"{class_name} lets the model's files choose the class")
    if library == "diffusers" and class_name in BAGS:
        home = importlib.import_module(BAGS[class_name].home)
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


def library_of(kind: type) -> str:
    """Returns the library of a class as model_index.json names it."""
    return "transformers" if kind.__module__.startswith("transformers.") else "diffusers"


def plain_files(root: Path) -> list[Path]:
    """Returns the files that a tokenizer or a scheduler may read: no dot files, pickles or code."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in files if not misplaced(f"{PIPELINE}{path.relative_to(root).as_posix()}", "config")]
