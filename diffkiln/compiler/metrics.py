"""Defines metrics: their inputs, their scores, and when they cannot be computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch


@dataclass(frozen=True)
class Pair:
    """One picture or video and its reference, drawn for the same prompt from the same noise.

    Attributes:
        picture, reference: float32 [frames, 3, height, width], 0 to 1; a picture is one frame.
        prompt: empty where the call takes none.
    """

    picture: torch.Tensor
    reference: torch.Tensor
    prompt: str


@dataclass(frozen=True)
class About:
    """The facts known before anything is drawn: size and number of the pictures, and the backbones' folders."""

    height: int
    width: int
    frames: int = 1
    count: int = 1
    backbones: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The value that a metric found, or the reason why it found none.

    Attributes:
        overall: of all pairs.
        each: of each pair, in order; empty where the metric is of all pictures together.
        reference: of the references by themselves, where the metric looks at one side alone.
    """

    overall: float
    each: tuple[float, ...] = ()
    reference: float | None = None


class Metric(ABC):
    """A way to compare pictures with their references.

    Attributes:
        unit: of its numbers; empty if they have none.
        better: whether higher or lower numbers are better.
        backbone: the kind of model that it needs, as `--backbone` names it; empty if it needs none.
        packages: what it imports.
    """

    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    backbone: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ("torchmetrics",)

    def objection(self, about: About) -> str:
        """Returns why nothing can be measured of such pictures; empty if it can. Reads no weights."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            return f"needs {', '.join(missing)}: pip install 'diffkiln[evaluate]'"
        if self.backbone and self.backbone not in about.backbones:
            return f"needs a backbone: --backbone {self.backbone}=FOLDER"
        return ""

    @abstractmethod
    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the numbers of all pairs."""


class PairMetric(Metric):
    """A metric of each pair by itself; over all pairs it is the mean."""

    def score(self, pairs: Sequence[Pair], about: About) -> Score:
        """Returns the number of each pair, and their mean."""
        each = tuple(self.value(pair, about) for pair in pairs)
        return Score(sum(each) / len(each), each)

    @abstractmethod
    def value(self, pair: Pair, about: About) -> float:
        """Returns the number of one pair; of a video, the mean over its frames."""
