"""One pipeline's call: compiled without engines, loaded, and compared with diffusers."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record.text import tokenizer_of
from tests.coverage.calls import CALLS
from tests.coverage.measure import RESULTS, told
from tests.pipelines.registry import Family
from tests.portably import as_recorded

FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
PROMPT, SEED = "A small red Fox", 5
#: The requests that all are compared with.
REQUESTS = ((SEED, PROMPT), (7, "an old city by the river at night, with blue light in the trees"))
#: How far a bundle may be from diffusers, relative to the greatest number where that is above 1.
TOLERANCE = 1e-5
#: Of an image whose size the spec does not say.
SIDE = 64
SIZES = ("height", "width")
#: What a modular pipeline is asked for: the first of these that its blocks give.
OUTPUTS = ("images", "videos", "audio", "audios", "sound")


def measure_call(name: str) -> dict[str, Any]:
    """What becomes of a pipeline's call: a program, how many operations it has, and whether it gives the same bits;
    or why it is none, and whether it runs as diffusers."""
    with tempfile.TemporaryDirectory(prefix="diffkiln-call-") as scratch:
        family, root = CALLS[name], Path(scratch)
        with quiet_libraries():
            pipe = family.build()
            pipe.save_pretrained(str(root / "model"), safe_serialization=True)
        result = {"class": type(pipe).__name__, "gives": family.gives}
        result |= {"text": "prompt" in _inputs(pipe)}
        result |= {"takes": sorted(family.images)} if family.images else {}
        found = told(lambda: _replayed(family, root))
        if "failure" not in found:
            return result | found
        if lengths := lengths_of(pipe, family):
            counted = _counted(family, root, lengths)
            if "failure" not in counted:
                return result | counted | {"by_length": True}
        result["diffusers"] = found["failure"]
        refused = told(lambda: _as_diffusers(family, root)).get("failure")
        return result | ({"refused": refused} if refused else {})


def _counted(family: Family, root: Path, lengths: dict[str, Any]) -> dict[str, Any]:
    """Returns what becomes of the call with lengths of prompts.

    Beside the text around it a prompt may have another number of tokens than alone, which the bundle says.
    """
    found = told(lambda: _replayed(family, root, lengths))
    for _ in REQUESTS:
        another = re.match(r"prompt: (\d+) tokens", found.get("failure", ""))
        if another is None:
            break
        lengths["prompt_tokens"] = sorted({*lengths["prompt_tokens"], int(another[1])})
        found = told(lambda: _replayed(family, root, lengths))
    return found


def write_call(name: str, result: dict[str, Any]) -> None:
    path = RESULTS / "calls" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def spec_of(family: Family, model: Path) -> dict[str, Any]:
    """The spec that compiles a family's folder for the call that suits it."""
    call = {key: value for key, value in family.call.items() if key not in ("prompt", "negative_prompt")}
    images = dict(family.images) if "height" in call else {key: _sized(size) for key, size in family.images.items()}
    inputs = {key: call.pop(key) for key in FIELDS if key in call} | {"call": call | images}
    return {"spec_version": 1, "source": {"model": str(model)}, "target": {"device": "cpu"}, "inputs": inputs}


def lengths_of(pipe: Any, family: Family) -> dict[str, Any]:
    """Returns what a spec's inputs say of the lengths of the prompts of all requests; nothing where none is known."""
    parts = getattr(pipe, "components", {})
    kinds = (part for part in map(tokenizer_of, parts.values()) if isinstance(part, PreTrainedTokenizerBase))
    tokenizer = next(kinds, None)
    if tokenizer is None or "prompt" not in _inputs(pipe):
        return {}

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids) - len(tokenizer("").input_ids)

    template = family.call.get("prompt", "{}")
    found: dict[str, Any] = {"prompt_tokens": sorted({count(template.replace("{}", text)) for _, text in REQUESTS})}
    if negative := family.call.get("negative_prompt"):
        found |= {"negative_prompt_tokens": count(negative)}
    return found


def _sized(size: Any) -> Any:
    """Images of a call without a size of its own, whose own must be said."""
    if isinstance(size, list):
        return [_sized(each) for each in size]
    return {"height": SIDE, "width": SIDE} if size == {} else size


def drawn(
    pipe: Any,
    family: Family,
    spec: dict[str, Any],
    seed: int = SEED,
    prompt: str = PROMPT,
    like: Any = None,
) -> torch.Tensor:
    """What a pipeline, diffusers' or compiled, gives for one of the requests that all are compared with.

    Args:
        pipe: called.
        family: the tiny pipeline.
        spec: what it was compiled with.
        seed: of the noise, and of images and tensors.
        prompt: given where the call takes one.
        like: the pipeline, or its class, whose call says which keywords there are; `pipe` by default.
    """
    inputs = spec["inputs"]
    lengths = ("prompt_tokens", "negative_prompt_tokens")
    given = {key: value for key, value in inputs.items() if key not in ("call", *lengths)} | inputs["call"]
    given |= given_to(family, inputs.get("height", SIDE), inputs.get("width", SIDE), seed)
    given |= {key: value for key, value in family.call.items() if key == "negative_prompt"}
    given |= {"prompt": family.call.get("prompt", "{}").replace("{}", prompt), "output_type": family.output}
    given |= {"generator": torch.Generator().manual_seed(seed)}
    wanted = pipe if like is None else like
    own = {*family.images, *(key for key in family.call if key not in SIZES)}
    if like is not None or not _takes_any(wanted):
        known = _inputs(wanted)
        given = {key: value for key, value in given.items() if key in known or key in own}
    if isinstance(pipe, diffusers.ModularPipeline):
        given |= {"output": [item.name for item in pipe.blocks.outputs if item.name in OUTPUTS][:1]}
    torch.manual_seed(seed)  # for what a pipeline draws without its generator
    result = pipe(**given)
    return as_tensor(next(iter(result.values())))


def _inputs(pipe: Any) -> Mapping[str, Any]:
    """The keywords of a pipeline's call, of a modular one the inputs of its blocks."""
    if isinstance(pipe, diffusers.ModularPipeline):
        return pipe.default_call_parameters
    return inspect.signature((pipe if isinstance(pipe, type) else type(pipe)).__call__).parameters


def _takes_any(pipe: Any) -> bool:
    """Whether it takes any keyword, as a bundle does."""
    kinds = {getattr(parameter, "kind", None) for parameter in _inputs(pipe).values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def reference_of(folder: Path) -> Any:
    """The pipeline of a folder, as diffusers loads it."""
    if (folder / "model_index.json").is_file():
        return diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe = diffusers.ModularPipeline.from_pretrained(str(folder))
    pipe.load_components()
    return pipe


def as_tensor(found: Any) -> torch.Tensor:
    """The first output of a pipeline, float32: a tensor, an array, or a list of either. Some give pictures as arrays
    where tensors are asked for, with their channels last."""
    found = torch.stack([as_tensor(item) for item in found]) if isinstance(found, list | tuple) else found
    if isinstance(found, torch.Tensor):
        return found.float()
    array = torch.from_numpy(np.asarray(found)).float()
    return array.movedim(-1, -3) if array.ndim in (4, 5) and array.shape[-1] in (1, 3, 4) else array


def given_to(family: Family, height: int, width: int, seed: int = SEED) -> dict[str, Any]:
    """Noise for each image and tensor that a family's call takes, in its list where it takes a list."""
    rng = np.random.default_rng(seed)

    def noise(size: Any) -> Any:
        if isinstance(size, list):
            return [noise(each) for each in size]
        if size is None:
            return None
        if "shape" in size:
            return _numbers(rng, size["shape"], size.get("dtype", "float32"))
        shape = size.get("height", height), size.get("width", width), 3
        return Image.fromarray(rng.integers(0, 256, shape, np.uint8))

    return {keyword: noise(sizes) for keyword, sizes in family.images.items()}


def _numbers(rng: np.random.Generator, shape: list[int], dtype: str) -> torch.Tensor:
    """Normal numbers; of another type, small counts and random truth."""
    if dtype == "bool":
        return torch.from_numpy(rng.random(shape) < 0.7)
    drawn = rng.integers(0, 4, shape) if dtype.startswith("int") else rng.standard_normal(shape)
    return torch.from_numpy(drawn).to(getattr(torch, dtype))


def _replayed(family: Family, root: Path, lengths: Mapping[str, Any] | None = None) -> dict[str, Any]:
    spec = spec_of(family, root / "model")
    if lengths:
        spec["inputs"] |= lengths
    bundle = root / ("by-length" if lengths else "bundle")
    shutil.rmtree(bundle, ignore_errors=True)
    built = diffkiln.compile(spec, bundle)
    with diffkiln.load(built.path) as pipe:
        failure = _compared(family, root, spec, pipe)
    if failure:
        return {"failure": f"the replay {failure}"}
    programs = [json.loads(path.read_text()) for path in (built.path / "programs").glob("*.json")]
    return {"programs": len(programs), "operations": sum(map(_operations, programs))}


def _as_diffusers(family: Family, root: Path) -> dict[str, Any]:
    spec = spec_of(family, root / "model") | {"runtime": {"on_unrecordable": "diffusers"}}
    built = diffkiln.compile(spec, root / "as-diffusers")
    with quiet_libraries():
        pipe = diffkiln.load(built.path, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    failure = _compared(family, root, spec, pipe)
    return {"failure": f"as diffusers it {failure}"} if failure else {}


def _compared(family: Family, root: Path, spec: dict[str, Any], pipe: Any) -> str:
    """How far a pipeline is from diffusers' own in each of the requests, if it is further than TOLERANCE.

    A program's constants are computed to be the same on every machine, which takes long: so diffusers' are computed the
    same way only where rounding grows.
    """
    with quiet_libraries():
        reference = reference_of(root / "model")
    reference.set_progress_bar_config(disable=True)

    def distance(alike: bool) -> float:
        found = []
        for request in REQUESTS:
            with as_recorded() if alike else nullcontext():
                pair = [drawn(each, family, spec, *request, like=reference) for each in (reference, pipe)]
            found.append(_distance(*pair))
        return max(found)

    with quiet_libraries(), torch.no_grad():  # some need gradients on their way
        found = distance(alike=False)
        if found > TOLERANCE:
            found = distance(alike=True)
    return "" if found <= TOLERANCE else f"differs by {found:.0e}"


def _distance(wanted: torch.Tensor, found: torch.Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    apart = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1))
    return apart if apart == apart else float("inf")


def _operations(program: Any) -> int:
    if isinstance(program, dict):
        return len(program["ops"]) if isinstance(program.get("ops"), list) else sum(map(_operations, program.values()))
    return sum(map(_operations, program)) if isinstance(program, list) else 0
