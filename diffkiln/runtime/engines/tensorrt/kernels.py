"""The kernels that TensorRT for RTX compiles where an engine runs, kept from one load to the next.

They are for one GPU, one driver and one version of the library, which TensorRT compares before it takes them. A bundle
is the same bytes for ever, so they lie with the user's own state, in a directory that nobody else may write to, by the
digest of the engine that they belong to. Those that a bundle brings along are taken first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from diffkiln.bundle.digest import sha256_file
from diffkiln.bundle.state import state_dir
from diffkiln.bundle.tensorrt import ENGINE, KERNELS
from diffkiln.errors import BuildError
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)


class Kernels:
    """The kernels of the engine in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cache: Any = None
        self._written: bytes | None = None
        self._file: Path | None = None

    def context(self, engine: Any, memory: Any) -> Any:
        """Returns a context that uses the kept kernels; an ordinary one if the library keeps none.

        Args:
            engine: TensorRT's.
            memory: TensorRT's strategy for the memory that the context needs while it runs.
        """
        config: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context(memory)
        self._file = self._own_file()
        self._cache = config.create_runtime_cache()
        for file in (self._directory / KERNELS, self._file):
            if file is not None and file.is_file():
                data = file.read_bytes()
                if self._cache.deserialize(data):  # false for those of another GPU, driver or version
                    self._written = data
                    break
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(memory)
        return engine.create_execution_context(config)

    def compiled(self) -> bytes:
        """Returns all kernels that the context has compiled so far; nothing if the library keeps none."""
        return b"" if self._cache is None else bytes(self._cache.serialize())

    def keep(self) -> None:
        """Writes the kernels compiled since the last time, whole or not at all. A failure to write loses nothing."""
        if self._cache is None or self._file is None:
            return
        data = bytes(self._cache.serialize())
        if data == self._written:
            return
        try:
            _replace(self._file, data)
            self._written = data
        except OSError as error:
            log.warning("kernels that TensorRT compiled are not kept, and will be compiled again: %s", error)

    def _own_file(self) -> Path | None:
        """Returns the user's file of kernels; None if there is no state directory."""
        try:
            return state_dir("kernels") / f"{sha256_file(self._directory / ENGINE)}.cache"
        except BuildError as error:
            log.warning("kernels that TensorRT compiles are not kept, and will be compiled again: %s", error)
            return None


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises `OSError`."""
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
