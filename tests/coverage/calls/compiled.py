"""Whole pipelines with a compiled denoiser: built, loaded in a fresh process, compared with diffusers.

Of those that take images, the ControlNet and the autoencoder, which encodes them, are compiled too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import diffkiln
from diffkiln.errors import DiffkilnError
from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import PROMPT, SEED, drawn, given_to, spec_of
from tests.coverage.measure import RESULTS, plain
from tests.pipelines.registry import Family

#: The families that are compiled.
COMPILED = (
    "sd", "sdxl", "sd3", "flux", "flux2", "pixart_sigma", "sana", "wan", "ltx", "qwen_image", "z_image", "cogvideox",
    "flux_img2img", "sd_controlnet_img2img",
)  # fmt: skip
_DRAW = Path(__file__).with_name("draw.py")


def measure_compiled(name: str, cache: EngineCache | None = None) -> dict[str, Any]:
    """How many engines the blocks of a pipeline's denoiser became, and how far its images are from diffusers'."""
    with tempfile.TemporaryDirectory(prefix="diffkiln-compiled-") as scratch:
        family, root = CALLS[name], Path(scratch)
        with quiet_libraries():
            pipe = family.build()
            pipe.save_pretrained(root / "model", safe_serialization=True)
        result = {"class": type(pipe).__name__, "video": family.video}
        passes = [{"name": "compile", "component": "transformer" if hasattr(pipe, "transformer") else "unet"}]
        encoding = [name for name in ("controlnet", "vae") if family.images and hasattr(pipe, name)]
        passes += [{"name": "compile", "component": name, "scope": "whole"} for name in encoding]
        try:
            return result | _compiled(family, passes, root, cache)
        except DiffkilnError as error:
            return result | {"failure": plain(str(error))}


def path_of(name: str) -> Path:
    return RESULTS / "compiled" / f"{name}.json"


def write_compiled(name: str, result: dict[str, Any]) -> None:
    path_of(name).parent.mkdir(exist_ok=True)
    path_of(name).write_text(json.dumps(result, indent=1) + "\n")


def _compiled(family: Family, passes: list[dict[str, Any]], root: Path, cache: EngineCache | None) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    spec = spec_of(family, root / "model")
    spec["passes"] = passes
    built = diffkiln.compile(spec, root / "bundle", cache=cache)
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(root / "model")
        reference.set_progress_bar_config(disable=True)
        wanted = drawn(reference, family, spec).double()
    told, found = _fresh(family, spec, built.path, root / "found.pt")
    difference = float((found.double() - wanted).norm() / wanted.norm())
    if {"diffusers", "transformers"} & set(told["modules"]):
        return {"failure": "the fresh process imported diffusers or transformers"}
    if not difference <= 1e-4:
        return {"failure": f"differs from diffusers by {difference:.0e}, relative to its norm"}
    return {"engines": told["engines"], "difference": f"{difference:.0e}"}


def _fresh(family: Family, spec: dict[str, Any], bundle: Path, out: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """What a fresh process gives that has the bundle and no more."""
    keywords = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    keywords |= {key: value for key, value in family.call.items() if key == "negative_prompt"}
    images = given_to(family, keywords["height"], keywords["width"])
    for name, image in images.items():
        image.save(out.with_name(f"{name}.png"))
    if images and not _takes_a_size(bundle):
        keywords = {key: value for key, value in keywords.items() if key not in ("height", "width")}
    job = {
        "bundle": str(bundle),
        "keywords": {"prompt": PROMPT} | {k: v for k, v in keywords.items() if k not in images},
        "images": {name: str(out.with_name(f"{name}.png")) for name in images},
        "seed": SEED,
        "field": "frames" if family.video else "images",
        "out": str(out),
    }
    done = subprocess.run([sys.executable, str(_DRAW), json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DiffkilnError(f"a fresh process cannot draw with it: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]), torch.load(out)


def _takes_a_size(bundle: Path) -> bool:
    """Whether the call has keywords for the size of what it makes, and not only its images."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    return "height" in manifest["pipeline"]["variants"][0]["fixed"]
