"""A weight store for programs that run while a bundle is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.program.moments import Key


class InMemory:
    """A weight store, and its cursor, for components that are in memory already."""

    streams = False

    def __init__(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._weights = weights

    def key_of(self, component: str, _weight: str) -> Key:
        return component, ""

    def get(self, key: Key) -> Mapping[str, torch.Tensor]:
        return self._weights[key[0]]

    enter = get

    def leave(self, key: Key) -> None:
        """Keeps the weights."""

    def peek(self, component: str, weight: str) -> torch.Tensor:
        return self._weights[component][weight]

    def follow(self, _schedule: Any, _residency: Any = None) -> InMemory:
        return self

    def close(self) -> None:
        """Keeps the weights."""
