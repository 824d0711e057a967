"""The source of a compilation, as far as it is known without loading a weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffkiln.models.added import Added
from diffkiln.models.checkpoint import Checkpoint
from diffkiln.models.components import Component, library_of
from diffkiln.models.folder import index_of, read_index, source_error


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A pipeline that can be loaded. `origin` is what identifies it apart from its digest; `gguf`, the files that hold
    components' weights in the place of checkpoints; `elsewhere`, what identifies the folders of components that are not
    the model's own; `added`, what passes add to its components, which is no part of what identifies it."""

    folder: Path
    pipeline_class: type
    components: Mapping[str, Component]
    notices: list[str] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)
    gguf: Mapping[str, Path] = field(default_factory=dict)
    elsewhere: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    added: tuple[Added, ...] = ()

    @property
    def original(self) -> SourceModel:
        """Returns the source without what passes add."""
        names = {each.name for each in self.added}
        kept = {name: component for name, component in self.components.items() if name not in names}
        return replace(self, components=kept, added=()) if names else self

    def adding(self, added: Sequence[Added]) -> SourceModel:
        """Returns the source with more components, in the order in which they are called."""
        more = {each.name: each.component for each in added}
        return replace(self, components={**self.components, **more}, added=(*self.added, *added))

    def seed_of(self, name: str) -> str | None:
        """Returns the seed that a module's weights are drawn from; None where there are weights."""
        seed = self.origin.get("seed")
        return None if seed is None or any(each.name == name for each in self.added) else f"{seed}/{name}"

    @property
    def class_name(self) -> str:
        return self.pipeline_class.__name__

    @property
    def modules(self) -> tuple[str, ...]:
        """Returns the names of the components that are `torch.nn.Module`s, in the order of model_index.json."""
        return tuple(name for name, component in self.components.items() if component.library)

    @property
    def dtypes(self) -> dict[str, str]:
        """Returns the type that most of each module's weights were saved in, such as "bfloat16". GGUF's compute in
        bfloat16.
        """
        return {name: "bfloat16" if name in self.gguf else self.checkpoint(name).dtype for name in self.modules}

    def without(self, names: Collection[str]) -> SourceModel:
        """Returns the source without components that its call does not read, and a notice of each."""
        origin = [f"{name} is left out: the call does not read it" for name in sorted(names)]
        kept = {name: component for name, component in self.components.items() if name not in names}
        return replace(self, components=kept, notices=[*self.notices, *origin])

    def checkpoint(self, name: str) -> Checkpoint:
        checkpoint = self.components[name].checkpoint
        if checkpoint is None:
            raise ValueError(f"the component {name!r} has no weights")
        return checkpoint

    def weight_bytes(self, name: str) -> int:
        """Returns the size of a module's weights as saved, in bytes."""
        return self.checkpoint(name).nbytes

    def files(self) -> tuple[str, ...]:
        """Returns every file that is used, weights included: their names in a pipeline, with `/`, sorted."""
        return tuple(
            sorted({index_of(self.folder), *(file for part in self.components.values() for file in part.files())})
        )

    def entry(self, name: str) -> list[str]:
        """Returns library and class of a component, as model_index.json names them."""
        kind = self.components[name].kind
        own = read_index(self.folder).get(name)
        if isinstance(own, list) and len(own) == 2 and own[1] == kind.__name__:
            return own
        return [library_of(kind), kind.__name__]

    def path(self, name: str) -> Path:
        """Returns where a file is that `files` names."""
        folder, _, rest = name.partition("/")
        return self._folders[folder] / rest if folder in self._folders else self.folder / name

    @cached_property
    def _folders(self) -> dict[str, Path]:
        return {name: root for part in self.components.values() for name, root in part.folders().items()}

    def digest(self) -> str:
        """Returns "sha256:…" over path, size and SHA-256 of each file; computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(self._row, self.original.files()))
        return "sha256:" + hashlib.sha256(json.dumps([self._identity(), rows]).encode()).hexdigest()

    def _identity(self) -> Any:
        """Returns what the result depends on besides the files."""
        origin: dict[str, Any] = dict(self.gguf_digests())
        if files := self.file_digests():
            origin["single_file"] = files
        if absent := self.origin.get("without"):
            origin["without"] = absent
        if self.elsewhere:
            origin["classes"] = {name: self.components[name].kind.__name__ for name in sorted(self.elsewhere)}
        return origin or None

    def gguf_digests(self) -> dict[str, str]:
        """Returns "sha256:…" of each GGUF file, by component."""
        return {name: self._file_digest(path) for name, path in sorted(self.gguf.items())}

    def file_digests(self) -> dict[str, str]:
        """Returns "sha256:…" of the single file that each component's weights are in."""
        files = {name: part.file for name, part in sorted(self.original.components.items()) if part.file is not None}
        known = {path: self._file_digest(path) for path in set(files.values())}
        return {name: known[path] for name, path in files.items()}

    def _file_digest(self, path: Path) -> str:
        return f"sha256:{self._row(str(path))[2]}"

    def _row(self, name: str) -> tuple[str, int, str]:
        path = Path(name)
        try:
            with (path if path.is_absolute() else self.path(name)).open("rb") as file:
                return name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise source_error(f"{name} cannot be read: {error.strerror}") from error

    def pinned(self) -> dict[str, Any]:
        """Returns the source as a bundle names it: never a path of this machine."""
        origin: dict[str, Any] = {key: value for key, value in self.origin.items() if key != "without"}
        origin["digest"] = self.digest()
        if self.gguf:
            origin["gguf"] = self.gguf_digests()
        files = self.file_digests()
        if parts := {name: self._part(name, files) for name in self.elsewhere}:
            origin["components"] = parts
        if absent := self.origin.get("without"):
            origin["components"] = origin.get("components", {}) | dict.fromkeys(absent)
        if whole := {digest for name, digest in files.items() if name not in self.elsewhere}:
            origin["single_file"] = whole.pop()
        return origin

    def _part(self, name: str, files: Mapping[str, str]) -> Any:
        """Identifies a component from elsewhere: each folder by repository, commit and digest; its single file by its
        digest."""
        part = self.components[name]
        own = [file for file in part.files() if name not in self.gguf]
        rows = hashlib.sha256(json.dumps([self._row(file) for file in sorted(own)]).encode()).hexdigest()
        whole: dict[str, Any] = {"digest": f"sha256:{rows}"}
        if name in files:
            whole["single_file"] = files[name]
        origins = [dict(origin) for origin in self.elsewhere[name]]
        return [origin | whole for origin in origins] if len(origins) > 1 else {**(origins or [{}])[0], **whole}
