"""Opens a source: a diffusers folder, a pinned repository on the Hub, or an architecture with a seed.

`open_source` looks at everything that can be known without loading a weight, and lists all that is wrong at once.
Code that comes with a model is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkiln.errors import MissingDependency
from diffkiln.models.architectures import open_architecture
from diffkiln.models.checkpoint import STEMS
from diffkiln.models.folder import LEFT_OUT, entries, read_folder, read_index, source_error
from diffkiln.models.licences import CARD
from diffkiln.models.source import SourceModel
from diffkiln.spec.model import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


def open_source(source: Source, base: Path) -> SourceModel:
    """Find and check what `source` names; relative paths are relative to `base`. Weights are not read.

    Raises:
        SourceError: it is not there, incomplete, not a diffusers pipeline, or brings code of its own.
        MissingDependency: a Hub repository is asked for and huggingface_hub is not installed.
    """
    if source.architecture is not None:
        return open_architecture(source.architecture, source.seed or 0, source.pipeline)
    model = source.model or ""
    try:
        folder = (base / Path(model).expanduser()).absolute()
        if folder.exists():
            return _open_folder(source, folder, base)
    except (OSError, RuntimeError) as error:
        raise source_error(f"{model} cannot be read: {error}") from error
    if not HUB_ID.fullmatch(model):
        raise source_error(f"there is no folder {model}", f"It was looked for at {folder}")
    if source.revision is None or not COMMIT.fullmatch(source.revision):
        why = "needs a revision" if source.revision is None else f"cannot be pinned to {source.revision!r}"
        raise source_error(
            f"{model} is no folder, and as a repository on the Hub it {why}",
            f"Give the commit, 40 hexadecimal digits from https://huggingface.co/{model}/commits/main",
            where="$.source.revision",
        )
    folder = _download(model, source.revision)
    return _opened(folder, source, base, {"model": model, "revision": source.revision})


def _opened(folder: Path, source: Source, base: Path, origin: Mapping[str, Any]) -> SourceModel:
    """The model in a folder, with the weights of some components in GGUF files."""
    gguf = {name: (base / Path(file).expanduser()).absolute() for name, file in (source.gguf or {}).items()}
    origin = {**origin, "pipeline": source.pipeline} if source.pipeline else origin
    found = SourceModel(folder, *read_folder(folder, elsewhere=gguf, pipeline=source.pipeline), origin, gguf)
    for name, path in gguf.items():
        where = f"$.source.gguf.{name}"
        component = found.components.get(name)
        if component is None or component.library != "diffusers":
            fitting = [other for other in found.modules if found.components[other].library == "diffusers"]
            hint = f"A GGUF file can hold one of {', '.join(fitting)}"
            raise source_error(f"{name!r} is no component that diffusers loads", hint, where)
        if not path.is_file():
            raise source_error(f"there is no file {path.name}", f"It was looked for at {path}", where)
    return found


def _open_folder(source: Source, folder: Path, base: Path) -> SourceModel:
    model, revision = source.model or "", source.revision
    if not folder.is_dir():
        raise source_error(
            f"{model} is a file, not a folder in diffusers' format",
            "Convert it: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)",
        )
    if revision is not None:
        raise source_error(f"{model} is a local folder, which has no revisions", "Remove it", "$.source.revision")
    return _opened(folder, source, base, {})


def _download(repo: str, revision: str) -> Path:
    """The snapshot of a repository in the Hub's cache: one variant of the weights, no pickles, no code."""
    with from_the_hub(repo, revision):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=["model_index.json"]))
        if not (folder / "model_index.json").is_file():
            raise source_error(f"{repo} is no diffusers pipeline: it has no model_index.json at {revision[:12]}")
        names = [name for name, entry in entries(read_index(folder)) if entry[0] and name not in LEFT_OUT]
        kinds = ["*.json", "*.txt", "*.model", "*.jinja"]
        kinds += [f"{stem}{end}" for stem in STEMS.values() for end in (".safetensors", "-*-of-*.safetensors")]
        patterns = ["model_index.json", CARD, *(f"{name}/{kind}" for name in names for kind in kinds)]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


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
