"""Pipelines whose bits are compared: both compute as the recorder does, so that their constants are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffkiln.interpreter.portable import portable
from diffkiln.record.flex import dense_flex_attention


@contextmanager
def as_recorded() -> Iterator[None]:
    """While it lasts, every operator is rounded once, as a whole: without inference mode, torch shows its parts. Flex
    attention, which torch compiles, is attention under a full mask, as in a program."""
    with torch.inference_mode(), portable(), dense_flex_attention():
        yield


class Portably:
    """A pipeline whose calls compute so."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        with as_recorded():
            return self._pipe(*args, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)
