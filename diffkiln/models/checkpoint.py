"""The weight files of one component: which they are and what their headers say. No weight is read.

Only safetensors are taken. A pickle (`.bin`, `.ckpt`, `.pt`) can run code while it is loaded, so it is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from diffkiln.errors import SourceError
from diffkiln.guards.limits import active

#: What builds a module: a library, or one of diffkiln's own plug-ins (diffkiln.models.upscalers).
Library = Literal["diffusers", "transformers", "upscalers"]

#: Names of the weights without suffix, as the two libraries save them.
STEMS: dict[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")

#: safetensors' names of types, as torch calls them, and their size in bytes.
_TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
}


class SavedTensor(NamedTuple):
    """One tensor as the header of a `file` describes it. `dtype` is torch's name of the type."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of one component: file names within its folder, and every tensor by name."""

    files: tuple[str, ...]
    tensors: Mapping[str, SavedTensor]

    @property
    def dtype(self) -> str:
        """Returns the floating type that most bytes are saved in; float32 if there is none."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if "float" in tensor.dtype:
                sizes[tensor.dtype] += tensor.nbytes
        return max(sorted(sizes), key=sizes.__getitem__) if sizes else "float32"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_json(path: Path) -> Any:
    """Returns the content of a configuration file.

    Raises:
        SourceError: it cannot be read or is not JSON.
    """
    try:
        active().check("json_bytes", path.stat().st_size, path.name)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path.name} cannot be read: {error}") from error


def weight_files(library: str, variant: str | None = None) -> tuple[str, str]:
    """Returns the names of a single file of weights and of an index of several, as `library` calls those of a
    variant."""
    middle = f".{variant}" if variant else ""
    return f"{STEMS[library]}{middle}.safetensors", f"{STEMS[library]}.safetensors.index{middle}.json"


def has_variant(folder: Path, library: Library, variant: str | None) -> bool:
    """Returns True if the folder has weights of this variant."""
    return variant is not None and any((folder / name).is_file() for name in weight_files(library, variant))


def read_checkpoint(folder: Path, library: Library, variant: str | None = None) -> Checkpoint:
    """Finds the weights in `folder` as `library` does when it loads them, and reads their headers.

    Raises:
        SourceError: there are none, some are missing, or they are not safetensors.
    """
    stem = STEMS[library]
    single, index = (folder / name for name in weight_files(library, variant))
    # With both a single file and shards, diffusers loads the shards and transformers the single file.
    if index.is_file() and not (library == "transformers" and single.is_file()):
        shards = _shards(index)
        files = (index.name, *shards)
    elif single.is_file():
        shards = files = (single.name,)
    else:
        raise SourceError(_why_none(folder, stem))
    tensors: dict[str, SavedTensor] = {}
    for shard in shards:
        tensors |= read_header(folder / shard)
    return Checkpoint(files, tensors)


def _shards(index: Path) -> tuple[str, ...]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index.name} has no weight_map")
    shards = sorted({str(name) for name in weight_map.values()})
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise SourceError(f"{index.name} names {shard!r}, which is not a safetensors file beside it")
        if not (index.parent / shard).is_file():
            raise SourceError(f"{index.name} names {shard}, which is missing. Download the model again")
    return tuple(shards)


def _why_none(folder: Path, stem: str) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return (
            f"the weights are only there as {pickles[0]}, and loading a pickle can run code that it carries. "
            "Save them as safetensors: pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    if variants := [name for name in names if name.startswith(stem) and name.endswith(".safetensors")]:
        named = variants[0].removeprefix(f"{stem}.").partition(".")[0]
        hint = f'Add "variant": {json.dumps(named)} to the source'
        return f"the weights are only there as the variant {variants[0]}. {hint}, or save them as {stem}.safetensors"
    return f"there are no weights: no {stem}.safetensors and no {stem}.safetensors.index.json"


def read_header(path: Path) -> dict[str, SavedTensor]:
    """Returns every tensor of a safetensors file, as its header describes them.

    Raises:
        SourceError: It is not a safetensors file, or one of unknown types.
        LimitExceeded: Its header is longer, or has more rows, than the limits allow.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, SavedTensor] = {}
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            active().check("header_rows", len(file.keys()), path.name)
            for name in file.keys():  # noqa: SIM118  (it is not a mapping)
                part = file.get_slice(name)
                dtype, size = _TYPES[part.get_dtype()]
                shape = tuple(part.get_shape())
                tensors[name] = SavedTensor(dtype, shape, prod(shape) * size, path.name)
    except KeyError as error:
        raise SourceError(f"{path.name} holds tensors of the unknown type {error}") from error
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path.name} {_what_is_wrong(path)} ({error})") from error
    return tensors


def check_header(path: Path) -> None:
    """Raises `LimitExceeded` if the header of a safetensors file is longer than the limits allow."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length < path.stat().st_size:  # else it is cut short, or none, which the library says
        active().check("header_bytes", length, path.name)


def _what_is_wrong(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer and not the weights: run `git lfs pull` in the folder"
    return "is cut short or is not a safetensors file: download the model again"
