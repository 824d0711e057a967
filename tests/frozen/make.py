"""Makes this version's frozen bundles, once: `python -m tests.frozen.make`, from the root of the repository.

An old bundle is never made again: that it loads although its writer is gone is what it is kept for.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy

import diffkiln
from tests.exporters.regions import engine_cache
from tests.pipelines import build_folder

HERE = Path(__file__).parent
#: A T5 encoder, a denoiser of two blocks and a VAE, all of width 32.
FAMILY = "pixart_sigma"
SPEC: dict[str, Any] = {
    "spec_version": 1,
    "source": {"model": "source", "dtype": "float32"},
    "target": {"device": "cpu", "isa": "x86-64-v3"},
    "inputs": {
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "call": {"max_sequence_length": 32, "clean_caption": False, "use_resolution_binning": False},
    },
    "passes": [{"name": "fuse_qkv", "component": "transformer"}],
    "runtime": {"offload": {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}},
}
COMPILE = {"name": "compile", "component": "transformer", "backend": "aot_inductor", "scope": "blocks"}
KINDS: dict[str, list[dict[str, Any]]] = {"data": SPEC["passes"], "engine": [*SPEC["passes"], COMPILE]}


def drawn(bundle: Path, *, allow_native: bool = False) -> numpy.ndarray[Any, Any]:
    """The image of one request, [height, width, channels] from 0 to 1."""
    import torch

    pipe = diffkiln.load(bundle, allow_native=allow_native)
    try:
        generator = torch.Generator("cpu").manual_seed(7)
        return pipe("a kiln at night", generator=generator, output_type="np").images[0]
    finally:
        pipe.bundle.close()


def make(kind: str, room: Path) -> None:
    """Write `<version>/<kind>`: the spec, the bundle, and what the bundle draws."""
    place = HERE / diffkiln.__version__ / kind
    if place.exists():
        sys.exit(f"{place} is there, and a frozen bundle is never made again")
    build_folder(FAMILY, room).rename(room / "source")
    spec = SPEC | {"passes": KINDS[kind]}
    (room / "spec.json").write_text(json.dumps(spec, indent=1) + "\n")
    diffkiln.compile(room / "spec.json", room / "bundle", cache=engine_cache())
    place.mkdir(parents=True)
    shutil.copy(room / "spec.json", place)
    shutil.copytree(room / "bundle", place / "bundle")
    # Half precision is far finer than what kernels of another torch may differ by, and takes little room.
    numpy.save(place / "expected.npy", drawn(place / "bundle").astype(numpy.float16))


def main() -> None:
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as room:
            make(kind, Path(room))


if __name__ == "__main__":
    main()
