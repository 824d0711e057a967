"""Pipelines whose bits are compared."""

from __future__ import annotations

from typing import Any

from diffkiln.record.portable import portable


class Portably:
    """A pipeline that computes as the recorder does: constants of diffusers and of programs are the same."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        with portable():
            return self._pipe(*args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)
