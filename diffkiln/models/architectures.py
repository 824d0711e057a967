"""Known architectures with random weights as a source: true shapes where no checkpoint can be had.

The folder (configurations and stand-in tokenizers, no weights) is written once into the user's cache. Its name carries
a digest of what it is made from, so that a later diffkiln never reads a folder of an earlier one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from diffkiln.bundle.scratch import Scratch
from diffkiln.bundle.state import cache_home
from diffkiln.errors import BuildError, SourceError, SpecError
from diffkiln.models import stand_ins
from diffkiln.models.folder import Wanted, read_folder, source_error
from diffkiln.models.known_parts import Architecture
from diffkiln.models.meta import skeleton
from diffkiln.models.source import SourceModel
from diffkiln.plugins import plugins


@dataclass(frozen=True, eq=False)
class ArchitectureModel(SourceModel):
    """A source whose weights are drawn when they are loaded. `digest` covers configurations, name and seed."""

    @property
    def dtypes(self) -> dict[str, str]:
        dtype = architectures()[self.origin["architecture"]].dtype
        drawn = {name: dtype for name in self.modules if self.seed_of(name) is not None}
        return {each.name: self.checkpoint(each.name).dtype for each in self.added} | drawn

    def weight_bytes(self, name: str) -> int:
        return self._sizes[name]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for name in self.modules:
            tensors = skeleton(self, name).state_dict(keep_vars=True).values()
            sizes[name] = sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
        return sizes

    def _identity(self) -> Any:
        return dict(self.origin)


def architectures() -> dict[str, Architecture]:
    """Returns the architectures of all families by name.

    Raises:
        SpecError: two families have one of the same name.
    """
    found: dict[str, Architecture] = {}
    for plugin in plugins("families").values():
        known = plugin.load().architectures
        if both := sorted(found.keys() & known.keys()):
            raise SpecError(f"two families have the architecture {both[0]!r}, and {plugin.name} is one of them")
        found |= known
    return found


def open_architecture(name: str, seed: int, pipeline: str | None = None) -> ArchitectureModel:
    """Opens the architecture `name` with weights drawn from `seed`, as another pipeline if one is named.

    Raises:
        SourceError: diffkiln does not know it, or its folder cannot be written.
    """
    every = architectures()
    if name not in every:
        close = get_close_matches(name.lower(), every, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else ""
        known = f"Known are {', '.join(every)}"
        raise source_error(
            f"there is no architecture {name!r}", f"{hint} {known}".strip(), where="$.source.architecture"
        )
    try:
        folder = _cached_folder(name, every[name])
    except (OSError, BuildError) as error:
        raise SourceError(f"the folder of {name} cannot be written into the cache: {error}") from error
    origin = {"architecture": name, "seed": seed} | ({"pipeline": pipeline} if pipeline else {})
    return ArchitectureModel(folder, *read_folder(folder, Wanted(pipeline), weights=False), origin)


def _cached_folder(name: str, architecture: Architecture) -> Path:
    root = cache_home().directory("architectures")
    folder = root / f"{name}-{_version(architecture)}"
    if folder.is_dir():
        return folder
    staging = Scratch("staging", root)
    try:
        _write(architecture, staging.path)
        staging.path.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        staging.remove()
    return folder


def _version(architecture: Architecture) -> str:
    """Changes with everything that the folder is made from: its data, the stand-ins, and the library that saves."""
    import transformers

    makers = {part.stand_in for part in architecture.parts.values() if part.stand_in}
    files = {stand_ins.__file__, *map(inspect.getfile, makers)}
    code = sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files)
    data = json.dumps([code, architecture, transformers.__version__], default=lambda maker: maker.__qualname__)
    return hashlib.sha256(data.encode()).hexdigest()[:12]


def _write(architecture: Architecture, folder: Path) -> None:
    index: dict[str, Any] = {"_class_name": architecture.pipeline, **architecture.settings}
    for name, (library, kind, config, stand_in) in architecture.parts.items():
        index[name] = [library, kind]
        (folder / name).mkdir()
        if stand_in:
            stand_in(**config).save_pretrained(folder / name)
        elif library == "transformers":
            _dump({**config, "architectures": [kind], "dtype": architecture.dtype}, folder / name / "config.json")
        else:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            _dump({"_class_name": kind, **config}, folder / name / file)
    _dump(index, folder / "model_index.json")


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
