"""One pipeline's call: compiled without engines, loaded, and compared with diffusers bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import diffkiln
from diffkiln.errors import DiffkilnError
from diffkiln.record.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.measure import RESULTS, plain
from tests.pipelines.registry import Family

FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
#: Families whose denoiser is called at another length than by diffusers, so that its sums have another order.
PADDED = {"qwen_image", "z_image", "lumina2"}
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
    inputs = {key: call.pop(key) for key in FIELDS if key in call} | {"call": call}
    return {"spec_version": 1, "source": {"model": str(model)}, "target": {"device": "cpu"}, "inputs": inputs}


def drawn(pipe: Any, family: Family, spec: dict[str, Any], seed: int = SEED) -> torch.Tensor:
    """What a pipeline, diffusers' or compiled, gives for the request that all are compared with."""
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    negative = {key: value for key, value in family.call.items() if key == "negative_prompt"}
    result = pipe(**REQUEST, **negative, generator=torch.Generator().manual_seed(seed), **given)
    return result.frames if family.video else result.images


def _replayed(family: Family, root: Path) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    spec = spec_of(family, root / "model")
    built = diffkiln.compile(spec, root / "bundle")
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(root / "model")
        reference.set_progress_bar_config(disable=True)
        want = drawn(reference, family, spec)
    with diffkiln.load(built.path) as pipe:
        difference = float((want - drawn(pipe, family, spec)).abs().max())
    limit = 1e-5 if family.name in PADDED else 0.0
    if difference > limit:
        return {"diffusers": f"the replay differs by {difference:.0e}"}
    programs = [json.loads(path.read_text()) for path in (built.path / "programs").glob("*.json")]
    return {"programs": len(programs), "operations": sum(map(_operations, programs)), "equal": difference == 0.0}


def _operations(program: Any) -> int:
    if isinstance(program, dict):
        return len(program["ops"]) if isinstance(program.get("ops"), list) else sum(map(_operations, program.values()))
    return sum(map(_operations, program)) if isinstance(program, list) else 0
