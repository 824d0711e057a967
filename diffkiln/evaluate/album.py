"""Pictures that were drawn, in a folder. Each appears whole, so an evaluation that was killed goes on from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffkiln.errors import SpecError


@dataclass(frozen=True)
class Drawn:
    """One picture.

    Attributes:
        picture: float32 [frames, 3, height, width], 0 to 1.
        latents: float32 [steps, …], as each step left them; no steps where the call does not tell them.
        seconds: that its call took.
    """

    picture: torch.Tensor
    latents: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Album:
    """The pictures of one side, numbered as the requests are."""

    folder: Path

    def __contains__(self, number: int) -> bool:
        return self._file(number).is_file()

    def put(self, number: int, drawn: Drawn) -> None:
        """Keeps a picture: its exact values, and a PNG of its first frame for people."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pixels = (drawn.picture[0].movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(self.image(number))
        staged = self.folder / f".{number}.npz"
        with staged.open("wb") as file:
            np.savez(file, picture=drawn.picture, latents=drawn.latents, seconds=np.float64(drawn.seconds))
        os.replace(staged, self._file(number))

    def get(self, number: int) -> Drawn:
        """Returns a picture that was kept.

        Raises:
            SpecError: its file cannot be read.
        """
        try:
            with np.load(self._file(number), allow_pickle=False) as kept:
                picture, latents = torch.from_numpy(kept["picture"]), torch.from_numpy(kept["latents"])
                return Drawn(picture, latents, float(kept["seconds"]))
        except (OSError, ValueError, KeyError, EOFError):
            raise SpecError(f"{self._file(number)} cannot be read. Remove it, and it is drawn again") from None

    def image(self, number: int) -> Path:
        """Returns the path of a picture's PNG."""
        return self.folder / f"{number:05}.png"

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.npz"


def claim(
    folder: Path, record: Mapping[str, Any], name: str = "evaluation", others: str = "the images of another evaluation"
) -> None:
    """Makes a folder that of one evaluation, or checks that it is.

    Args:
        folder: it is made where it is missing.
        record: what the evaluation is of.
        name: of the work.
        others: what the folder holds if it is not that of this one.

    Raises:
        SpecError: it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if path.is_file():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == record
        except ValueError:
            same = False
        if not same:
            raise SpecError(f"{folder} holds {others}. Name another folder, or remove it")
    elif any(folder.iterdir()):
        raise SpecError(f"{folder} is not empty, and holds no {name}. Name another folder")
    else:
        path.write_text(json.dumps(record), encoding="utf-8")
