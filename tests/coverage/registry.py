"""The table of modules: for each class a tiny configuration, and what its `forward` is called with."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.pipelines.registry import randomise_module, seeded

GROUPS = ("transformer", "unet", "autoencoder", "text encoder")


class Draw:
    """Seeded inputs.

    >>> draw(2, 3)  # normal, float32[2, 3]
    >>> draw.ids(8, 4)  # int64[4], each below 8
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def ids(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self._generator)


#: From inputs to draw and a size, 1 or 2, to a module and the keywords of its call. The module is the same for both
#: sizes; images are twice as high for 2, and so are sequences as long.
Make = Callable[[Draw, int], tuple[torch.nn.Module, dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One class.

    Attributes:
        name: of the class.
        group: one of GROUPS.
        make: builds it.
        scope: what of it is compiled: see `compile_module`.
        fixed: keywords whose values its way depends on.
        note: what the table says of it.
        tolerance: how far it may be from the original, relative to the norm of what that gives.
    """

    name: str
    group: str
    make: Make
    scope: str
    fixed: tuple[str, ...] = ()
    note: str = ""
    tolerance: float = 1e-4

    def built(self, size: int = 1) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The module with seeded random weights, none of them zero, and the keywords of a call."""
        seed = zlib.crc32(self.name.encode())
        with seeded(seed):
            module, kwargs = self.make(Draw(seed), size)
        randomise_module(module, torch.Generator().manual_seed(seed))
        return module, kwargs


CASES: dict[str, Case] = {}


def case(name: str, group: str = "transformer", scope: str = "blocks", **fields: Any) -> Callable[[Make], Make]:
    """Register the decorated function as how the class of this name is built."""

    def register(make: Make) -> Make:
        if name in CASES:
            raise ValueError(f"the class {name!r} is registered twice")
        CASES[name] = Case(name, group, make, scope, **fields)
        return make

    return register


def grid(*sizes: int, axes: int = 3) -> torch.Tensor:
    """Positions of the tokens of an image or a video, float32[tokens, axes]; leading axes that are not given are 0."""
    found = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in sizes)).reshape(-1, len(sizes))
    return torch.nn.functional.pad(found, (axes - len(sizes), 0))
