"""How images become what an image encoder such as CLIP takes, read off its processor.

transformers' processors resize by Pillow, crop the centre, and scale and shift the numbers. What one does to an image
of some size is a list of edits, a factor, and a mean and a deviation for each channel. That this is all is found out
when the recording is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.aten import type_of
from diffkiln.errors import RecordError
from diffkiln.record.images import Sentinel
from diffkiln.record.tape import Tape


def encoded(
    tape: Tape,
    made: dict[str, Sequence[Sentinel]],
    original: Callable[..., Any],
    processor: Any,
    images: Sequence[Sentinel],
    **given: Any,
) -> Any:
    """What a processor gives for sentinels, its tensor made of marked inputs: one for those that are treated alike.

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
    if set(encoding) != {"pixel_values"}:
        raise RecordError(f"{_name(processor)} gives {', '.join(sorted(encoding))}, and diffkiln knows pixel_values")
    blank, marked = encoding["pixel_values"], []
    for (keyword, edits), group in groupby(images, lambda image: (image.origin.keyword, _edits(processor, image))):
        alike = list(group)
        source = {
            "kind": "image",
            "keyword": keyword,
            "index": [image.origin.index for image in alike],
            "edits": [list(edit) for edit in edits],
            "normalize": False,
            "binarize": False,
            "scaled": _scaled(processor),
        }
        marked.append(tape.new_input(keyword, type_of(blank[: len(alike)]), source))
        made[tape.inputs[-1].name] = alike
    encoding["pixel_values"] = marked[0] if len(marked) == 1 else torch.cat(marked)
    return encoding


def _edits(processor: Any, image: Sentinel) -> tuple[tuple[Any, ...], ...]:
    """What was done to an image before, and what the processor does to it."""
    edits: list[tuple[Any, ...]] = [*image.edits, ("convert", "RGB")]
    size = image.plain_size
    if processor.do_resize:
        size = _resized(processor, image)
        edits.append(("resize", *size, Image.Resampling(processor.resample).name.lower()))
    if processor.do_center_crop:
        size = size if processor.do_resize else image.size
        wanted = processor.crop_size["width"], processor.crop_size["height"]
        left, top = ((have - want) // 2 for have, want in zip(size, wanted, strict=True))
        edits.append(("crop", left, top, left + wanted[0], top + wanted[1]))
    return tuple(edits)


def _resized(processor: Any, image: Sentinel) -> tuple[int, int]:
    """Width and height."""
    wanted: Mapping[str, Any] = dict(processor.size)
    if wanted.get("height") and wanted.get("width"):
        return wanted["width"], wanted["height"]
    shortest = wanted.get("shortest_edge")
    if not shortest or wanted.get("longest_edge"):
        raise RecordError(f"{_name(processor)} resizes to {wanted}, which diffkiln does not record")
    width, height = image.size
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


def _scaled(processor: Any) -> dict[str, Any]:
    """The factor, mean and deviation that the numbers get."""
    scaled: dict[str, Any] = {"factor": float(processor.rescale_factor) if processor.do_rescale else 1.0}
    if processor.do_normalize:
        scaled |= {"mean": list(map(float, processor.image_mean)), "std": list(map(float, processor.image_std))}
    return scaled


def _name(processor: Any) -> str:
    return type(processor).__name__
