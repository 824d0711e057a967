"""What a quantizer is: the types that it knows, what they need, and the change of the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch

from diffkiln.spec import Target

#: Linear layers by name.
Layers = Mapping[str, torch.nn.Linear]
Granularity = Literal["per_row", "per_tensor"]


@dataclass(frozen=True)
class Settings:
    """The options of the pass that a quantizer reads."""

    type: str
    group_size: int
    granularity: Granularity
    double_quant: bool


class Quantizer(ABC):
    """Quantizes linear layers with one library.

    Class attributes: `package`, the module that is imported; `extra`, what installs it with diffkiln; `options`, by
    type which optional settings count; `compiles`, why aot_inductor does not take the layers, empty if it does.
    """

    package: ClassVar[str]
    extra: ClassVar[str]
    options: ClassVar[Mapping[str, tuple[str, ...]]]
    compiles: ClassVar[str] = ""

    def missing(self) -> str:
        """The reason why the library cannot be used here; empty if it can."""
        try:
            found = find_spec(self.package)
        except ModuleNotFoundError:  # of a package that holds it
            found = None
        return "" if found else f"{self.package} is not installed"

    def objections(self, settings: Settings, target: Target, layers: Layers) -> Iterable[tuple[str, str]]:
        """What the target or the layers lack for the type: reason, mend."""
        return ()

    def fits(self, layer: torch.nn.Linear, settings: Settings) -> bool:
        """Whether the type can hold the layer's weight; one that it cannot stays as it is."""
        return True

    @abstractmethod
    def quantize(self, module: torch.nn.Module, layers: Layers, settings: Settings) -> None:
        """Quantize these layers of the module in place, ghosts as well as real ones."""


def is_ghost(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no data."""
    return tensor.is_meta
