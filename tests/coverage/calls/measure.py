"""One pipeline's call: compiled without engines, loaded, and compared with diffusers bit for bit."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import diffkiln
from diffkiln.errors import DiffkilnError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.measure import RESULTS, plain
from tests.pipelines.registry import Family
from tests.portably import as_recorded

FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
#: Families of which a component computes at another length than in diffusers, so that its sums have another order.
PADDED = ("qwen_image", "z_image", "lumina", "mochi", "cogview4", "bria", "latte", "kandinsky3", "ernie_image")
#: The request that all are compared with.
REQUEST, SEED = {"prompt": "A small red Fox", "output_type": "pt"}, 5


def measure_call(name: str) -> dict[str, Any]:
    """What becomes of a pipeline's call: a program, how many operations it has, and how far it is from diffusers."""
    with tempfile.TemporaryDirectory(prefix="diffkiln-call-") as scratch:
        family, root = CALLS[name], Path(scratch)
        with quiet_libraries():
            pipe = family.build()
            pipe.save_pretrained(root / "model", safe_serialization=True)
        result = {"class": type(pipe).__name__, "video": family.video}
        result |= {"takes": sorted(family.images)} if family.images else {}
        try:
            return result | _replayed(family, root)
        except DiffkilnError as error:
            return result | {"diffusers": plain(str(error))}


def write_call(name: str, result: dict[str, Any]) -> None:
    path = RESULTS / "calls" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def spec_of(family: Family, model: Path) -> dict[str, Any]:
    """The spec that compiles a family's folder for the call that suits it."""
    call = {key: value for key, value in family.call.items() if key not in ("prompt", "negative_prompt")}
    inputs = {key: call.pop(key) for key in FIELDS if key in call} | {"call": call | dict(family.images)}
    return {"spec_version": 1, "source": {"model": str(model)}, "target": {"device": "cpu"}, "inputs": inputs}


def drawn(pipe: Any, family: Family, spec: dict[str, Any], seed: int = SEED) -> torch.Tensor:
    """What a pipeline, diffusers' or compiled, gives for the request that all are compared with."""
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    given |= images_for(family, given["height"], given["width"])
    if family.images and "height" not in inspect.signature(type(pipe).__call__).parameters:
        given = {key: value for key, value in given.items() if key not in ("height", "width")}
    negative = {key: value for key, value in family.call.items() if key == "negative_prompt"}
    torch.manual_seed(seed)  # for what a pipeline draws without its generator
    result = pipe(**REQUEST, **negative, generator=torch.Generator().manual_seed(seed), **given)
    return result.frames if family.video else result.images


def images_for(family: Family, height: int, width: int) -> dict[str, Any]:
    """Noise for each image that a family's call takes, in its list where it takes a list."""
    rng = np.random.default_rng(SEED)

    def image(size: dict[str, int]) -> Image.Image:
        shape = size.get("height", height), size.get("width", width), 3
        return Image.fromarray(rng.integers(0, 256, shape, np.uint8))

    return {
        keyword: [image(size) for size in sizes] if isinstance(sizes, list) else image(sizes)
        for keyword, sizes in family.images.items()
    }


def _replayed(family: Family, root: Path) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    spec = spec_of(family, root / "model")
    built = diffkiln.compile(spec, root / "bundle")
    with quiet_libraries(), portable():
        reference = DiffusionPipeline.from_pretrained(root / "model")
        reference.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            want = drawn(reference, family, spec)
    with diffkiln.load(built.path) as pipe, as_recorded():
        difference = float((want - drawn(pipe, family, spec)).abs().max() / want.abs().max().clamp(min=1))
    limit = 1e-5 if family.name.startswith(PADDED) else 0.0
    if difference > limit:
        return {"diffusers": f"the replay differs by {difference:.0e}"}
    programs = [json.loads(path.read_text()) for path in (built.path / "programs").glob("*.json")]
    return {"programs": len(programs), "operations": sum(map(_operations, programs)), "equal": difference == 0.0}


def _operations(program: Any) -> int:
    if isinstance(program, dict):
        return len(program["ops"]) if isinstance(program.get("ops"), list) else sum(map(_operations, program.values()))
    return sum(map(_operations, program)) if isinstance(program, list) else 0
