"""How images become what an image encoder such as CLIP takes, read off its processor.

transformers' processors resize, by Pillow or by torch, crop the centre, and scale and shift the numbers. Qwen2-VL's
cuts patches then, which the program does. What one does to an image of some size is a list of edits, a factor, and a
mean and a deviation for each channel. That this is all is found out when the recording is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import type_of
from diffkiln.program.images import TORCH_BICUBIC, size_after
from diffkiln.record.sentinels import Sentinel
from diffkiln.record.tape import Tape

_Size = tuple[int, int]


def encoded(
    tape: Tape,
    made: dict[str, Sequence[Sentinel]],
    original: Callable[..., Any],
    processor: Any,
    images: Sequence[Sentinel],
    **given: Any,
) -> Any:
    """Returns a processor's result for sentinels, its tensor made of one marked input for all images treated alike.

    Args:
        tape: the call's.
        made: takes what each input is made of, by its name.
        original: the processor class's `__call__`.
        processor: one of transformers'.
        images: of one keyword or several, as Wan gives the first and the last image of a video together.
        **given: the call's other arguments.

    Raises:
        RecordError: the processor does something else.
    """
    with _disable_current_modes():
        encoding = original(processor, [Image.new("RGB", image.plain_size) for image in images], **given)
    cut = _cut(processor, encoding, images)
    sizes = cut or [None] * len(images)
    treated = [
        (image.origin.keyword, _edits(processor, image, size)) for image, size in zip(images, sizes, strict=True)
    ]
    marked = []
    for (keyword, edits), group in groupby(range(len(images)), treated.__getitem__):
        alike = [images[index] for index in group]
        width, height = size_after(edits, None) or alike[0].plain_size
        source = {
            "kind": "image",
            "keyword": keyword,
            "index": [image.origin.index for image in alike],
            "edits": [list(edit) for edit in edits],
            "normalize": False,
            "binarize": False,
            "scaled": _scaled(processor),
        }
        type_ = replace(type_of(encoding["pixel_values"]), shape=(len(alike), 3, height, width))
        pixels = tape.new_input(keyword, type_, source)
        made[tape.inputs[-1].name] = alike
        marked.append(_patches(processor, pixels) if cut else pixels)
    encoding["pixel_values"] = marked[0] if len(marked) == 1 else torch.cat(marked)
    return encoding


def scaled(processor: Any, images: torch.Tensor, **given: Any) -> Any:
    """Returns the result of a processor that only scales a marked tensor: its numbers shifted and divided, by channel.

    Raises:
        RecordError: the processor does something else.
    """
    from transformers import BatchFeature

    def wanted(name: str) -> Any:
        return given.get(name, getattr(processor, name, None))

    if any(wanted(name) for name in ("do_resize", "do_center_crop", "do_rescale", "do_pad")):
        raise RecordError(
            f"{_name(processor)} edits a tensor of images, and diffkiln records that it scales its numbers"
        )
    if wanted("do_normalize"):
        rows = (torch.tensor(wanted(name), dtype=images.dtype) for name in ("image_mean", "image_std"))
        mean, std = (row.reshape(-1, 1, 1) for row in rows)
        images = (images - mean) / std
    return BatchFeature({"pixel_values": images})


def _cut(processor: Any, encoding: Mapping[str, Any], images: Sequence[Sentinel]) -> list[_Size] | None:
    """Returns width and height of each image that is cut into patches; None if the processor cuts none."""
    if set(encoding) == {"pixel_values"}:
        return None
    if set(encoding) != {"pixel_values", "image_grid_thw"} or not hasattr(processor, "temporal_patch_size"):
        raise RecordError(f"{_name(processor)} gives {', '.join(sorted(encoding))}, and diffkiln knows pixel_values")
    for image in images:
        image.look()
    grids, side = encoding["image_grid_thw"].tolist(), processor.patch_size
    return [(columns * side, rows * side) for _, rows, columns in grids]


def _patches(processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Cuts [images, 3, height, width] into [patches, numbers] as Qwen2-VL's processor cuts a still image.

    Patches that are merged later follow each other, and every patch comes as often as a video would have frames.
    """
    side, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    count, channels, height, width = pixels.shape
    rows, columns = height // (side * merge), width // (side * merge)
    patches = pixels.reshape(count, channels, rows, merge, side, columns, merge, side)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    return patches.reshape(count * rows * columns * merge**2, channels * frames * side**2)


def _edits(processor: Any, image: Sentinel, cut: _Size | None) -> tuple[tuple[Any, ...], ...]:
    """Returns the earlier edits of an image, and those of the processor."""
    edits: list[tuple[Any, ...]] = [*image.edits, ("convert", "RGB")]
    size = image.plain_size
    if processor.do_resize:
        size = cut or _fixed_size(processor) or _by_its_shorter_side(processor, image.size)
        edits.append(("resize", *size, _filter(processor)))
    if getattr(processor, "do_center_crop", None):
        edits.append(_crop(processor, size if processor.do_resize else image.size))
    return tuple(edits)


def prepared(processor: Any, size: _Size) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Returns what a processor does to a picture of this width and height: its edits, and how it scales the numbers.

    Raises:
        RecordError: it does something else.
    """
    edits: list[tuple[Any, ...]] = []
    if processor.do_resize:
        size = _fixed_size(processor) or _by_its_shorter_side(processor, size)
        edits.append(("resize", *size, _filter(processor)))
    if getattr(processor, "do_center_crop", None):
        edits.append(_crop(processor, size))
    return edits, _scaled(processor)


def _crop(processor: Any, size: _Size) -> tuple[Any, ...]:
    wanted = processor.crop_size["width"], processor.crop_size["height"]
    left, top = ((have - want) // 2 for have, want in zip(size, wanted, strict=True))
    return ("crop", left, top, left + wanted[0], top + wanted[1])


def _fixed_size(processor: Any) -> _Size | None:
    """Returns the width and height that all images get."""
    wanted: Mapping[str, Any] = dict(processor.size)
    return (wanted["width"], wanted["height"]) if wanted.get("height") and wanted.get("width") else None


def _by_its_shorter_side(processor: Any, size: _Size) -> _Size:
    """Returns the width and height of an image of this size, whose shorter side the processor fixes."""
    wanted: Mapping[str, Any] = dict(processor.size)
    shortest = wanted.get("shortest_edge")
    if not shortest or wanted.get("longest_edge"):
        raise RecordError(f"{_name(processor)} resizes to {wanted}, which diffkiln does not record")
    width, height = size
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


def _filter(processor: Any) -> str:
    """Returns the name of the filter: Pillow's, or torch's for processors that torchvision brings."""
    name = Image.Resampling(processor.resample).name.lower()
    if not _is_torch(processor):
        return name
    if name != "bicubic":
        raise RecordError(f"{_name(processor)} resizes by torchvision's {name}, which diffkiln does not record")
    return TORCH_BICUBIC


def _scaled(processor: Any) -> dict[str, Any]:
    """Returns the factor, mean and deviation that pixels are scaled by."""
    if _is_torch(processor):
        return _scaled_at_once(processor)
    scaled: dict[str, Any] = {"factor": float(processor.rescale_factor) if processor.do_rescale else 1.0}
    if processor.do_normalize:
        scaled |= {"mean": list(map(float, processor.image_mean)), "std": list(map(float, processor.image_std))}
    return scaled


def _scaled_at_once(processor: Any) -> dict[str, Any]:
    """Returns the scaling of torchvision's processors, which compute in float32 and divide mean and deviation by the
    factor.
    """
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return {"factor": torch.tensor(factor, dtype=torch.float32).item()}
    rows = (torch.tensor(row, dtype=torch.float32) for row in (processor.image_mean, processor.image_std))
    mean, std = (row * (1.0 / factor) for row in rows)
    return {"factor": 1.0, "mean": mean.tolist(), "std": std.tolist()}


def _is_torch(processor: Any) -> bool:
    return getattr(processor, "backend", "pil") == "torchvision"


def _name(processor: Any) -> str:
    return type(processor).__name__
