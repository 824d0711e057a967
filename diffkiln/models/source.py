"""The source of a compilation, as far as it is known without loading a weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkiln.models.checkpoint import Checkpoint
from diffkiln.models.folder import Component, plain_files, source_error

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False)
class SourceModel:
    """A pipeline that can be loaded. `origin` is what identifies it apart from its digest; `gguf`, the files that hold
    components' weights in the place of checkpoints."""

    folder: Path
    pipeline_class: type
    components: Mapping[str, Component]
    notices: list[str] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)
    gguf: Mapping[str, Path] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        return self.pipeline_class.__name__

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the components that are `torch.nn.Module`s, in the order of model_index.json."""
        return tuple(name for name, component in self.components.items() if component.library)

    @property
    def dtypes(self) -> dict[str, str]:
        """The type that most of each module's weights were saved in, such as "bfloat16", which GGUF's compute in."""
        return {name: "bfloat16" if name in self.gguf else self.checkpoint(name).dtype for name in self.modules}

    def checkpoint(self, name: str) -> Checkpoint:
        checkpoint = self.components[name].checkpoint
        if checkpoint is None:
            raise ValueError(f"the component {name!r} has no weights")
        return checkpoint

    def weight_bytes(self, name: str) -> int:
        """Size of a module's weights as saved, in bytes."""
        return self.checkpoint(name).nbytes

    def files(self) -> tuple[str, ...]:
        """Every file that is used, weights included: paths relative to `folder` with `/`, sorted."""
        names = ["model_index.json"]
        for component in self.components.values():
            if component.library:
                checkpoint_files = component.checkpoint.files if component.checkpoint else ()
                names += [f"{component.name}/{file}" for file in ("config.json", *checkpoint_files)]
            else:
                root = self.folder / component.name
                names += [path.relative_to(self.folder).as_posix() for path in plain_files(root)]
        return tuple(sorted(names))

    def digest(self) -> str:
        """ "sha256:…" over path, size and SHA-256 of each file; computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(self._row, self.files()))
        return "sha256:" + hashlib.sha256(json.dumps([self._identity(), rows]).encode()).hexdigest()

    def _identity(self) -> Any:
        """What the result depends on besides the files."""
        return self.gguf_digests() or None

    def gguf_digests(self) -> dict[str, str]:
        """ "sha256:…" of each GGUF file, by component."""
        return {name: f"sha256:{self._row(str(path))[2]}" for name, path in sorted(self.gguf.items())}

    def _row(self, name: str) -> tuple[str, int, str]:
        try:
            with (self.folder / name).open("rb") as file:  # an absolute name stays what it is
                return name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise source_error(f"{name} cannot be read: {error.strerror}") from error

    def pinned(self) -> dict[str, Any]:
        """The source as a bundle names it: never a path of this machine."""
        return {**self.origin, "digest": self.digest()} | ({"gguf": self.gguf_digests()} if self.gguf else {})
