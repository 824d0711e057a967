"""Which parts of a pipeline its call reads, of those that can be left out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any


class Reading:
    """Notes which parts are read while the pipeline is called.

    Args:
        pipe: the pipeline.
        names: of the parts to watch; none of them is a module.
    """

    def __init__(self, pipe: Any, names: Collection[str]) -> None:
        self._parts = {name: part for name in names if (part := pipe.components.get(name)) is not None}
        self.read: set[str] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Counts what is called or asked for an attribute as read, inside the `with` block."""
        own = {name: type(part) for name, part in self._parts.items()}
        try:
            for name, part in self._parts.items():
                part.__class__ = self._noting(name, own[name])
            yield
        finally:
            for name, part in self._parts.items():
                part.__class__ = own[name]

    def _noting(self, name: str, kind: type) -> type:
        def attribute(part: Any, key: str) -> Any:
            found = object.__getattribute__(part, key)  # diffusers asks every component for some that it has not
            if not key.startswith("__"):
                self.read.add(name)
            return found

        def call(part: Any, *args: Any, **kwargs: Any) -> Any:
            self.read.add(name)
            return kind.__call__(part, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__getattribute__": attribute, "__call__": call})
