"""Opens a source: a diffusers folder, a pinned repository on the Hub, a single file, or an architecture with a seed.

`open_source` looks at everything that can be known without loading a weight, and lists all that is wrong at once.
Code that comes with a model is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from diffkiln.errors import MissingDependency
from diffkiln.interpreter.modular import INDEX, MODULAR_INDEX
from diffkiln.models.architectures import open_architecture
from diffkiln.models.checkpoint import STEMS
from diffkiln.models.components import ComponentFiles
from diffkiln.models.folder import LEFT_OUT, Wanted, entries, index_of, read_folder, read_index, source_error
from diffkiln.models.licences import CARD
from diffkiln.models.single_file import known_config
from diffkiln.models.source import SourceModel
from diffkiln.spec import as_tuple
from diffkiln.spec.model import ComponentSource, Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


def open_source(source: Source, base: Path) -> SourceModel:
    """Finds and checks the model that `source` names, relative to `base`. Weights are not read.

    Raises:
        SourceError: it is not there, incomplete, not a diffusers pipeline, or brings its own code.
        MissingDependency: a Hub repository is asked for and huggingface_hub is not installed.
    """
    if source.architecture is not None:
        return open_architecture(source.architecture, source.seed or 0, source.pipeline)
    gguf = {name: _beside(file, base) for name, file in (source.gguf or {}).items()}
    given = _given_files(source, base)
    file = single_file(source.single_file, base, "$.source.single_file") if source.single_file else None
    wanted = Wanted(source.pipeline, source.variant, given, source.omit or (), gguf, file)
    folder, origin = _folder(source, base, file, _left_alone(wanted))
    found = SourceModel(folder, *read_folder(folder, wanted), _origin(origin, source, given), gguf, _stated(given))
    _check_gguf(found)
    return found


def _origin(origin: Mapping[str, Any], source: Source, given: Mapping[str, ComponentFiles | None]) -> dict[str, Any]:
    """Returns what identifies the source apart from its digest: what a spec says of it, but for paths."""
    own: dict[str, Any] = {"pipeline": source.pipeline} if source.pipeline else {}
    if source.variant:
        own["variant"] = source.variant
    if source.omit:
        own["omit"] = list(source.omit)
    if absent := sorted(name for name, files in given.items() if files is None):
        own["without"] = absent
    return {**origin, **own}


def _folder(source: Source, base: Path, file: Path | None, unneeded: Collection[str]) -> tuple[Path, dict[str, Any]]:
    """Returns the folder with the pipeline's configuration, and what identifies it."""
    if file is None:
        known = _local(source.model or "", source.revision, base, "$.source")
        if known is not None:
            return known, {}
        return _from_the_hub(source.model or "", source.revision, "$.source", unneeded, source.variant)
    known = _local(source.config, source.revision, base, "$.source", "config") if source.config else None
    if known is not None:
        return known, {}
    repo = source.config or known_config(file)
    where = "$.source"
    folder, origin = _from_the_hub(repo, source.revision, where, unneeded, None, "config", weights=False)
    return folder, {"config": origin["model"], "revision": origin["revision"]}


def _local(model: str, revision: str | None, base: Path, where: str, field: str = "model") -> Path | None:
    """Returns the local folder that a spec names; None where it is a repository on the Hub."""
    try:
        folder = _beside(model, base)
        if not folder.exists():
            if not HUB_ID.fullmatch(model):
                raise source_error(f"there is no folder {model}", f"It was looked for at {folder}", f"{where}.{field}")
            return None
    except (OSError, RuntimeError) as error:
        raise source_error(f"{model} cannot be read: {error}", where=f"{where}.{field}") from error
    if not folder.is_dir():
        raise source_error(
            f"{model} is a file, not a folder in diffusers' format", hint_for_file(model), f"{where}.{field}"
        )
    if revision is not None:
        raise source_error(f"{model} is a local folder, which has no revisions", "Remove it", f"{where}.revision")
    return folder


def hint_for_file(name: str) -> str:
    """Returns what to write in a source for a file that is no folder."""
    if name.endswith(".safetensors"):
        return f'Give it as "single_file": {json.dumps(name)}, with "config", a folder in diffusers\' format'
    return "Convert it: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"


def _from_the_hub(
    repo: str,
    revision: str | None,
    where: str,
    unneeded: Collection[str],
    variant: str | None,
    field: str = "model",
    *,
    weights: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Returns the snapshot of a pipeline's repository at its commit, and what identifies it."""
    commit = _pinned_commit(repo, revision, where, field)
    with from_the_hub(repo, commit, f"{where}.{field}"):
        from huggingface_hub import snapshot_download

        indexes = [INDEX, MODULAR_INDEX]
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=indexes))
        if not (folder / index_of(folder)).is_file():
            raise source_error(f"{repo} is not a diffusers pipeline: it has no model_index.json at {commit[:12]}")
        names = [name for name, entry in entries(read_index(folder)) if entry[0] and name not in unneeded]
        patterns = [*indexes, CARD]
        for name in names:
            patterns += [
                f"{folder_name}/{kind}" for folder_name in (name, f"{name}_*") for kind in _kinds(weights, variant)
            ]
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns)), {
            "model": repo,
            "revision": commit,
        }


def _pinned_commit(repo: str, revision: str | None, where: str, field: str = "model") -> str:
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    why = "needs a revision" if revision is None else f"cannot be pinned to {revision!r}"
    raise source_error(
        f"{repo} is not a folder, and as a repository on the Hub it {why}",
        f"Give the commit, 40 hexadecimal digits from https://huggingface.co/{repo}/commits/main",
        where=f"{where}.revision",
    )


def _kinds(weights: bool, variant: str | None = None) -> list[str]:
    """Returns the patterns of a component's files: one variant of the weights, no pickles, no code."""
    kinds = ["*.json", "*.txt", "*.model", "*.jinja"]
    for stem in STEMS.values() if weights else ():
        kinds += [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors"]
        if variant:
            kinds += [f"{stem}.{variant}.safetensors", f"{stem}*{variant}*.safetensors"]
    return kinds


def _beside(file: str, base: Path) -> Path:
    return (base / Path(file).expanduser()).absolute()


def _check_gguf(found: SourceModel) -> None:
    for name, path in found.gguf.items():
        where = f"$.source.gguf.{name}"
        component = found.components.get(name)
        if component is None or component.library != "diffusers" or component.members:
            fitting = [other for other in found.modules if found.components[other].library == "diffusers"]
            hint = f"A GGUF file can hold one of {', '.join(fitting)}"
            raise source_error(f"{name!r} is not a component that diffusers loads", hint, where)
        if not path.is_file():
            raise source_error(f"there is no file {path.name}", f"It was looked for at {path}", where)


# -- components from elsewhere --


def _given_files(source: Source, base: Path) -> dict[str, ComponentFiles | None]:
    """Returns where the components are that the spec has from elsewhere; None for one that is left out."""
    return {
        name: None if given is None else files_of(name, as_tuple(given), base, f"$.source.components.{name}")
        for name, given in (source.components or {}).items()
    }


def files_of(name: str, given: Sequence[ComponentSource], base: Path, where: str) -> ComponentFiles:
    """Returns where a component is that comes from elsewhere: one folder, or one for each model of several."""
    first = given[0]
    if len(given) > 1 and any(item.single_file for item in given):
        raise source_error("a list is of folders, and it holds a single file", "Give folders", where)
    found = [
        _component_folder(name, item, base, f"{where}[{index}]" if len(given) > 1 else where)
        for index, item in enumerate(given)
        if item.model is not None
    ]
    file = single_file(first.single_file, base, f"{where}.single_file") if first.single_file else None
    variants = {item.variant for item in given}
    if len(variants) > 1:
        raise source_error("the models of a list are of several variants", "Give all of them the same", where)
    origins = [origin for _, origin in found]
    return ComponentFiles(tuple(folder for folder, _ in found), variants.pop(), file, origins)


def _component_folder(name: str, given: ComponentSource, base: Path, where: str) -> tuple[Path, dict[str, Any]]:
    model = given.model or ""
    root, origin = _local(model, given.revision, base, where), {}
    if root is None:
        commit = _pinned_commit(model, given.revision, where)
        origin = {"model": model, "revision": commit}
        kinds = _kinds(given.single_file is None, given.variant)
        inside = [f"{folder}/{kind}" for folder in {given.subfolder or name} for kind in kinds]
        with from_the_hub(model, commit, f"{where}.model"):
            from huggingface_hub import snapshot_download

            root = Path(
                snapshot_download(model, revision=commit, allow_patterns=["model_index.json", CARD, *kinds, *inside])
            )
    if given.subfolder is not None:
        origin |= {"subfolder": given.subfolder}
    parts = PurePosixPath(given.subfolder or "")
    if parts.is_absolute() or ".." in parts.parts:
        raise source_error(
            f"{given.subfolder!r} leads out of the model", "Name a directory in it", f"{where}.subfolder"
        )
    if given.subfolder is None and (root / "model_index.json").is_file():
        parts = PurePosixPath(name)
    folder = root / parts
    if not folder.is_dir():
        raise source_error(f"{model} has no directory {parts}", 'Name it with "subfolder"', where)
    return folder, origin


def single_file(file: str, base: Path, where: str) -> Path:
    path = _beside(file, base)
    if not path.is_file():
        raise source_error(f"there is no file {path.name}", f"It was looked for at {path}", where)
    return path


def _left_alone(wanted: Wanted) -> set[str]:
    """Returns the components whose own files are not used."""
    replaced = {name for name, files in wanted.given.items() if files is None or files.folders}
    return {*replaced, *wanted.omit, *(LEFT_OUT if wanted.omit else ())}


def _stated(given: Mapping[str, ComponentFiles | None]) -> dict[str, Any]:
    """Returns what identifies each component that comes from elsewhere."""
    return {name: list(files.origin) for name, files in given.items() if files is not None}


@contextmanager
def from_the_hub(repo: str, revision: str, where: str = "$.source.model") -> Iterator[None]:
    """Turns what huggingface_hub raises into a SourceError with the hint.

    Raises:
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
    except ImportError:
        raise MissingDependency('The Hub needs huggingface_hub: pip install "diffkiln[hub]"') from None
    try:
        yield
    except GatedRepoError as error:
        hint = f"Accept its licence at https://huggingface.co/{repo} and log in: hf auth login"
        raise source_error(f"{repo} is given to registered users only", hint, where) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "Check the name, the commit and the network, or give a local folder"
        raise source_error(f"{repo} at {revision[:12]} cannot be had from the Hub: {reason}", hint, where) from error
