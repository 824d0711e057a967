"""What a recorded call does to the images that a caller gives, before they become tensors: a closed list of edits.

An input of a call program whose source has the kind "image" names the keyword, which of the keyword's images it is made
of (`index`, in the order of the batch), the `edits` of each in their order, and what happens to the pixels, float32
from 0 to 1, after that: `normalize` to -1 to 1, `binarize` at 0.5. With `size` the images must be [width, height]
pixels, since the pipeline looked at their size while it was recorded. With `scaled` the pixels, from 0 to 255, are
multiplied by a `factor`, and a `mean` is taken from each channel and it is divided by its `std`, for an image encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Keywords of pipelines' calls that take an image, or a list of them.
IMAGES = (
    "image", "images", "mask_image", "control_image", "last_image", "image_reference", "reference_images", "video",
)  # fmt: skip

#: torch's own filter of bytes, with antialiasing, by which torchvision resizes. Some bytes are not those of Pillow's.
TORCH_BICUBIC = "torch_bicubic"
#: Pillow's names of filters, and that.
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", TORCH_BICUBIC)
MODES = ("RGB", "L", "RGBA")
#: How its names of modes of more than eight bits a channel begin. It converts them to eight by cutting off at 255.
DEEP = ("I", "F")

#: No image has more pixels on a side.
MAX_SIDE = 2**16


def is_edits(value: Any) -> bool:
    """Returns True if this is a list of edits: ["resize", width, height, filter] or, in two steps, ["resize", width,
    height, filter, gap], as Pillow's `reducing_gap`; ["crop", left, top, right, bottom]; and ["convert", mode]."""
    return isinstance(value, list | tuple) and all(map(_is_edit, value))


def _is_edit(edit: Any) -> bool:
    match edit:
        case ["resize", width, height, str(name)]:
            return is_size([width, height]) and name in FILTERS
        case ["resize", width, height, str(name), gap] if type(gap) in (int, float):
            return is_size([width, height]) and name in FILTERS and name != TORCH_BICUBIC and 1 <= gap < MAX_SIDE
        case ["crop", int(), int(), int(), int()]:
            near = all(abs(number) < MAX_SIDE for number in edit[1:])
            return near and is_size([edit[3] - edit[1], edit[4] - edit[2]])
        case ["convert", str(mode)]:
            return mode in MODES
    return False


def is_size(value: Any) -> bool:
    """Returns True if the value is [width, height] in pixels."""
    sides = value if isinstance(value, list | tuple) else ()
    return len(sides) == 2 and all(type(side) is int and 0 < side < MAX_SIDE for side in sides)


def is_scaled(value: Any) -> bool:
    """Returns True if this is {"factor": number} with, or without, "mean" and "std" of each channel."""
    if not isinstance(value, Mapping) or not _numbers([value.get("factor")]):
        return False
    rows = [value[name] for name in ("mean", "std") if name in value]
    return len(rows) in (0, 2) and all(_numbers(row) and len(row) == 3 for row in rows) and all(value.get("std", ()))


def _numbers(values: Any) -> bool:
    """Returns True if these are numbers of a usable size."""
    plain = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
    return plain and all(abs(value) < MAX_SIDE for value in values)


def size_after(edits: Any, size: Any) -> tuple[int, int] | None:
    """Returns width and height of an image after its edits; None if neither edits nor `size` give them."""
    for name, *numbers in reversed(edits):
        match name:
            case "resize":
                return numbers[0], numbers[1]
            case "crop":
                return numbers[2] - numbers[0], numbers[3] - numbers[1]
    return tuple(size) if size else None


def image_keywords(inputs: Any) -> dict[str, int]:
    """Returns keyword → number of images that it takes, from a call program's inputs."""
    found: dict[str, int] = {}
    for item in inputs:
        source: Mapping[str, Any] = item.source
        if source.get("kind") == "image":
            found[source["keyword"]] = max(found.get(source["keyword"], 0), max(source["index"]) + 1)
    return found
