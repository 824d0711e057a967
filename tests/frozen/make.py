"""Makes this version's frozen bundles, once: `python -m tests.frozen.make`, from the root of the repository.

An old bundle is never made again: that it loads although its writer is gone is what it is kept for.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy

import diffkiln
from tests.exporters.regions import engine_cache
from tests.frozen.kinds import KINDS, requests

HERE = Path(__file__).parent
PICTURE = numpy.ndarray[Any, Any]


def drawn(bundle: Path, calls: list[dict[str, Any]], *, allow_native: bool = False) -> list[PICTURE]:
    """The image of each call, [height, width, channels] from 0 to 1."""
    pipe = diffkiln.load(bundle, allow_native=allow_native)
    try:
        return [_image(pipe, keywords) for keywords in calls]
    finally:
        pipe.bundle.close()


def drawn_by_diffusers(bundle: Path, calls: list[dict[str, Any]], *, allow_native: bool = False) -> list[PICTURE]:
    """The same from the original pipeline that the bundle makes."""
    pipe = diffkiln.load(bundle, allow_native=allow_native, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    return [_image(pipe, keywords) for keywords in calls]


def _image(pipe: Any, keywords: dict[str, Any]) -> PICTURE:
    import torch

    generator = torch.Generator("cpu").manual_seed(7)
    return pipe(generator=generator, output_type="np", **keywords).images[0]


def make(kind: str, room: Path) -> None:
    """Write `<version>/<kind>`: the spec, the bundle, and what the bundle draws."""
    place = HERE / diffkiln.__version__ / kind
    if place.exists():
        print(f"{place} is there, and a frozen bundle is never made again")
        return
    file = KINDS[kind].save(room)
    diffkiln.compile(file, room / "bundle", cache=engine_cache())
    place.mkdir(parents=True)
    shutil.copy(file, place)
    shutil.copytree(room / "bundle", place / "bundle")
    for index, image in enumerate(drawn(place / "bundle", requests(kind, KINDS[kind].spec))):
        # Half precision is far finer than what kernels of another torch may differ by, and takes little room.
        numpy.save(place / (f"expected_{index}.npy" if index else "expected.npy"), image.astype(numpy.float16))


def main() -> None:
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as room:
            make(kind, Path(room))


if __name__ == "__main__":
    main()
