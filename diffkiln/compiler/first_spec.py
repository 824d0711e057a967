"""A first spec for a model: its sizes and steps as the pipeline has them, and the passes that suit its denoiser.

Only configuration is read; of a repository on the Hub only configuration is downloaded.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import SpecError
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.folder import Wanted, entries, read_folder, read_index, source_error
from diffkiln.models.meta import meta_pipeline
from diffkiln.models.opening import HUB_ID, from_the_hub, hint_for_file
from diffkiln.models.source import SourceModel
from diffkiln.passes.base import State
from diffkiln.passes.model.fuse_qkv import FuseQKV
from diffkiln.program.images import IMAGES
from diffkiln.spec import TARGETS, Target, find_gpu, parse_spec, suggest

#: Share of a GPU's memory that weights may take; the rest is for activations.
_SHARE = 0.8


@dataclass(frozen=True)
class Wishes:
    """The wishes of a user of `init`; None takes the model's own value."""

    pipeline: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    frames: int | None = None
    targets: Sequence[str] = ()


@dataclass(frozen=True)
class FirstSpec:
    """A spec as JSON, with notes for its reader."""

    spec: Mapping[str, Any]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Configuration(SourceModel):
    """A model of which only the configuration is there."""

    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: self.types.get(name, "float32") for name in self.modules}


def first_spec(
    model: str, output: str | os.PathLike[str], revision: str = "main", wishes: Wishes | None = None
) -> FirstSpec:
    """Returns a spec for `model` that `check` accepts.

    Args:
        model: a folder in diffusers' format, or a repository on the Hub.
        output: where the spec will lie, since a folder is named relative to it.
        revision: branch, tag or commit of a repository.
        wishes: what the user asks for.

    Raises:
        SourceError: the model is not there or is not a diffusers pipeline.
        SpecError: a target has no such name, or the pipeline takes no such size.
        MissingDependency: the Hub is asked and huggingface_hub is not installed.
    """
    wishes = wishes or Wishes()
    targets = [_named(name) for name in wishes.targets] or [_this_machine()]
    folder, source = _found(model, Path(output), revision)
    configured = _Configuration(folder, *read_folder(folder, Wanted(wishes.pipeline), weights=False))
    if wishes.pipeline:
        source["pipeline"] = wishes.pipeline
    pipe = meta_pipeline(configured)
    plan = State(configured.class_name, {name: pipe.components[name] for name in configured.modules})
    notices = list(configured.notices)
    dtype = _dtype(targets)
    if dtype:
        source["dtype"] = dtype
        notices.append(f"weights are {dtype} on the GPU; remove source.dtype to keep the types of the checkpoint")
    spec: dict[str, Any] = {
        "spec_version": 1,
        "source": source,
        "target": _targets_as_json(targets),
        "inputs": _inputs(pipe, wishes),
        "passes": list(_passes(plan, targets[0])),
    }
    if _too_large(plan, targets):
        spec["runtime"] = {"offload": {"num_blocks_per_group": 1}}
        notices.append("the weights do not fit into the GPU's memory, so they are offloaded in groups of blocks")
    notices += _notices(pipe, spec)
    parse_spec(spec)  # whatever was put together is a spec
    return FirstSpec(spec, tuple(notices))


def write_spec(spec: Mapping[str, Any], output: Path, *, force: bool = False) -> None:
    """Writes a spec as JSON.

    Raises:
        SpecError: the file is there already and `force` is not given, or it cannot be written.
    """
    text = _laid_out(spec)
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SpecError(f"{output} is there already. Give another name, or replace it with --force") from None
    except OSError as error:
        raise SpecError(
            f"{output} cannot be written: {error.strerror}. Give a file in a folder that is there"
        ) from None


def _laid_out(spec: Mapping[str, Any]) -> str:
    """Returns the spec with a line for each field and each pass, as people write it."""
    lines = []
    for name, value in spec.items():
        if name == "passes" and value:
            inner = ",\n".join(f"    {json.dumps(item)}" for item in value)
            lines.append(f'  "passes": [\n{inner}\n  ]')
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


# -- the source --


def _found(model: str, output: Path, revision: str) -> tuple[Path, dict[str, Any]]:
    """Returns the folder that holds the configuration, and the source as the spec writes it."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        base = output.expanduser().absolute().parent
        return folder, {"model": os.path.relpath(folder.absolute(), base)}
    if folder.exists():
        reason = f"{model} is a file, not a folder in diffusers' format"
        raise source_error(reason, hint_for_file(model), "MODEL")
    if not HUB_ID.fullmatch(model):
        raise source_error(f"there is no folder {model}", "A model on the Hub is named owner/name", "MODEL")
    return _from_hub(model, revision)


def _from_hub(repo: str, revision: str) -> tuple[Path, dict[str, Any]]:
    """Fetches the configuration of a repository, pinned to the commit that `revision` means now."""
    with from_the_hub(repo, revision, "MODEL"):
        from huggingface_hub import HfApi, snapshot_download

        commit = str(HfApi().model_info(repo, revision=revision).sha)
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=["model_index.json"]))
        if not (folder / "model_index.json").is_file():
            raise source_error(f"{repo} is not a diffusers pipeline: it has no model_index.json", where="MODEL")
        names = [name for name, entry in entries(read_index(folder)) if entry[0]]
        kinds = ("*.json", "*.txt", "*.model", "*.jinja")
        patterns = ["model_index.json", *(f"{name}/{kind}" for name in names for kind in kinds)]
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
    return folder, {"model": repo, "revision": commit}


# -- the target --


def _named(name: str) -> Target:
    target = TARGETS.get(name) or find_gpu(name)
    if target is None:
        hint = suggest(name, TARGETS) or "`diffkiln targets` lists them"
        raise SpecError(f"there is no target {name!r}. {hint}")
    return target


def _this_machine() -> Target:
    """Returns this machine's GPU if it is a known one, or else the default level of CPUs."""
    gpu = find_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    return gpu or TARGETS["cpu-x86-64-v3"]


def _targets_as_json(targets: Sequence[Target]) -> Any:
    written = [_target_as_json(target) for target in targets]
    return written[0] if len(written) == 1 else written


def _target_as_json(target: Target) -> dict[str, str]:
    if target.device == "cuda":
        return {"device": "cuda", "gpu": target.name}
    return {"device": "cpu", "isa": target.isa}


def _dtype(targets: Sequence[Target]) -> str | None:
    """Returns the type that GPUs compute fast in; None for CPUs, which use the saved type."""
    gpus = [target for target in targets if target.device == "cuda"]
    if not gpus or len(gpus) < len(targets):
        return None
    return "bfloat16" if all(gpu.capability >= (8, 0) for gpu in gpus) else "float16"


def _too_large(plan: State, targets: Sequence[Target]) -> bool:
    """Returns True if the weights, at two bytes each, are too much for the smallest GPU."""
    smallest = min((t.memory_bytes for t in targets if t.memory_bytes is not None), default=None)
    count = sum(tensor.numel() for module in plan.modules.values() for tensor in module.parameters())
    return smallest is not None and 2 * count > _SHARE * smallest


# -- the call --


def _inputs(pipe: Any, wishes: Wishes) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    images = _images(type(pipe), parameters)
    inputs: dict[str, Any] = {}
    if images or "height" in parameters:
        height, width = _sizes(pipe, parameters)
        inputs |= {"height": wishes.height or height, "width": wishes.width or width}
    for name in ("num_frames", "num_inference_steps", "guidance_scale"):
        default = parameters[name].default if name in parameters else None
        if isinstance(default, int | float):
            inputs[name] = default
    if "num_inference_steps" in parameters:
        inputs["num_inference_steps"] = wishes.steps or inputs.get("num_inference_steps", 50)
    if "num_frames" in parameters and wishes.frames:
        inputs["num_frames"] = wishes.frames
    _all_granted(type(pipe).__name__, inputs, wishes)
    if images:
        inputs["call"] = {keyword: {} for keyword in images}
    return inputs


def _all_granted(pipeline: str, inputs: Mapping[str, Any], wishes: Wishes) -> None:
    """Raises `SpecError` if the user asks for a size that the pipeline's call does not take."""
    wished = {"height": wishes.height, "width": wishes.width, "steps": wishes.steps, "frames": wishes.frames}
    keywords = {"steps": "num_inference_steps", "frames": "num_frames"}
    for name, value in wished.items():
        keyword = keywords.get(name, name)
        if value is not None and keyword not in inputs:
            raise SpecError(f"{pipeline} takes no {keyword}. Leave --{name} out")


def _sizes(pipe: Any, parameters: Mapping[str, inspect.Parameter]) -> tuple[int, int]:
    """Returns the pipeline's own height and width: the call's defaults, or else its denoiser's in latent pixels."""
    height, width = (parameters[side].default if side in parameters else None for side in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    scale = int(getattr(pipe, "vae_scale_factor", 8))
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    latent = getattr(denoiser, "config", {}).get("sample_size") or getattr(pipe, "default_sample_size", None) or 128
    sides = (latent, latent) if isinstance(latent, int) else tuple(latent)
    return int(sides[0]) * scale, int(sides[-1]) * scale


def _images(kind: type, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Returns the image keywords that a call needs; the user adds optional ones."""
    taken = [name for name in IMAGES if name in parameters]
    needed = [name for name in taken if parameters[name].default is inspect.Parameter.empty]
    return needed if _starts_from_text(kind) else taken


def _starts_from_text(kind: type) -> bool:
    """Returns True if diffusers' own tables list the pipeline as making images or videos from text alone."""
    with quiet_libraries():
        from diffusers.pipelines import auto_pipeline

    tables = (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_TEXT2VIDEO_PIPELINES_MAPPING)
    return any(kind is known and "control" not in key for table in tables for key, known in table.items())


# -- the passes --


def _passes(plan: State, target: Target) -> Iterator[dict[str, Any]]:
    """Yields fused projections if diffusers would use them, and compiled blocks if the class declares any."""
    for name in plan.denoisers:
        if not FuseQKV(component=name).check(plan, target, ""):
            yield {"name": "fuse_qkv", "component": name}
        if repeated_blocks(plan.modules[name]):
            yield {"name": "compile", "component": name}


def _notices(pipe: Any, spec: Mapping[str, Any]) -> Iterator[str]:
    inputs = spec["inputs"]
    sizes = [f"{inputs['width']} × {inputs['height']} pixels"] if "width" in inputs else []
    sizes += [f"{inputs['num_frames']} frames"] if "num_frames" in inputs else []
    sizes += [f"{inputs['num_inference_steps']} steps"] if "num_inference_steps" in inputs else []
    at = ", ".join(sizes) or "its own size"
    yield f"{type(pipe).__name__} at {at}: a bundle serves the sizes and steps of its spec, so set those you need"
    if not any(step["name"] == "compile" for step in spec["passes"]):
        yield "no component declares repeated blocks, so nothing is compiled; operations are replayed one by one"
    for keyword in inputs.get("call", {}):
        yield f'the call takes {keyword}; {{}} is an image of the size above: see "Images" in docs/spec.md'


__all__ = ["FirstSpec", "Wishes", "first_spec", "write_spec"]
