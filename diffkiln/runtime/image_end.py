"""Images to tensors, as the recorded pipeline did it: resized, cropped, converted, normalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffkiln.errors import CallError
from diffkiln.program.images import DEEP, TORCH_BICUBIC


def image_list(keyword: str, value: Any) -> list[Any]:
    """Returns the images that a caller gives for one keyword.

    Args:
        value: a `PIL.Image.Image`, a NumPy array [height, width, channels] or a tensor [channels, height, width], 0 to
            1; a list of such; or an array or a tensor with a leading dimension for the batch, for a video's
            frames, or for both.

    Raises:
        CallError: none of these.
    """
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):  # a place in one of several lists may have no image
            value = [[each for each in item if each is not None] if isinstance(item, list) else item for item in value]
        return [image for item in value for image in image_list(keyword, item)]
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim in (2, 3):
        return [value]
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim in (4, 5):
        return [image for item in value for image in image_list(keyword, item)]
    raise CallError(f"{keyword}: {type(value).__name__} is neither an image nor a list, an array or a tensor of images")


def refusal(source: Mapping[str, Any], images: Sequence[Any]) -> str:
    """Returns why these images of one keyword do not fit an input; empty if they fit."""
    keyword, wanted = source["keyword"], source["size"]
    for index in source["index"] if wanted else ():
        size = _size(images[index])
        if size != tuple(wanted):
            return (
                f"{keyword}: {size[0]} x {size[1]} pixels (width x height), this variant takes "
                f"{wanted[0]} x {wanted[1]}. Resize it, or compile a variant for its size"
            )
    return ""


def pixels(source: Mapping[str, Any], shape: Sequence[int], images: Sequence[Any]) -> torch.Tensor:
    """Returns the tensor of one input, equal to the result of diffusers' `VaeImageProcessor.preprocess`.

    Args:
        source: of the input; see `diffkiln.program.images`.
        shape: of the input: images, channels, height, width.
        images: all of the keyword's, one by one.

    Returns:
        float32 of that shape, on the CPU.

    Raises:
        CallError: an image that cannot be read or does not become that shape, or numbers that are not from 0 to 1.
    """
    rows = [_row(source, shape, images[index]) for index in source["index"]]
    tensor = torch.stack(rows)
    if source["scaled"]:
        return tensor
    if not isinstance(images[0], torch.Tensor):  # pixels stay side by side, as convolutions may round by it
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if source["normalize"]:
        tensor = 2.0 * tensor - 1.0
    return (tensor >= 0.5).float() if source["binarize"] else tensor.float()


def _row(source: Mapping[str, Any], shape: Sequence[int], image: Any) -> torch.Tensor:
    keyword = source["keyword"]
    if isinstance(image, Image.Image):
        array = _edited(source, image)
        found, made = f"an image of mode {image.mode!r}", (*array.shape[2:], *array.shape[:2])
        made = made if array.ndim == 3 else (1, *made)
        if made == tuple(shape[1:]):
            numbers = _scaled(array, source["scaled"]) if source["scaled"] else array.astype(np.float32) / 255.0
            return torch.from_numpy(numbers.reshape(*made[1:], made[0])).permute(2, 0, 1)
    elif source["scaled"]:
        raise CallError(f"{keyword}: it goes to an image encoder, too. Give a PIL image, not numbers")
    else:
        tensor = _resized(source, shape, _channels_first(keyword, image))
        if tensor.shape == tuple(shape[1:]):
            return tensor
        found, made = f"{type(image).__name__} of shape {tuple(image.shape)}", tuple(tensor.shape)
    raise CallError(
        f"{keyword}: {found} becomes {made}, this variant takes {tuple(shape[1:])} (channels, height, width)"
    )


def _edited(source: Mapping[str, Any], image: Image.Image) -> np.ndarray[Any, Any]:
    """Returns the pixels of an image after its edits: uint8 or bool, [height, width, channels] or [height, width]."""
    keyword = source["keyword"]
    if image.mode.startswith(DEEP):  # which Pillow would cut off at 255, so that all is white
        raise CallError(
            f"{keyword}: an image of mode {image.mode!r} has more than eight bits. Give its numbers, scaled to 0 to 1, "
            "as an array"
        )
    if 0 in image.size:
        raise CallError(f"{keyword}: {image.width} x {image.height} pixels (width x height) are no image")
    try:
        for name, *values in source["edits"]:
            image = _EDITS[name](image, values)
        return np.array(image)
    except Exception as error:  # whatever Pillow raises for broken files and odd modes
        raise CallError(f"{keyword}: the image cannot be read: {error}. Try image.convert('RGB')") from error


def _scaled(array: np.ndarray[Any, Any], scaled: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Scales and shifts pixels as transformers' processors do: [height, width, channels], float32."""
    numbers = (array.astype(np.float64) * scaled["factor"]).astype(np.float32)
    if "mean" not in scaled:
        return numbers
    return (numbers - np.array(scaled["mean"], np.float32)) / np.array(scaled["std"], np.float32)


def _resize(image: Image.Image, values: Sequence[Any]) -> Image.Image:
    width, height, name, *gap = values
    if name != TORCH_BICUBIC:
        how = {"reducing_gap": gap[0]} if gap else {}
        return image.resize((width, height), resample=Image.Resampling[name.upper()], **how)
    given = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    made = torch.nn.functional.interpolate(given, (height, width), mode="bicubic", antialias=True)
    return Image.fromarray(made[0].permute(1, 2, 0).numpy())


_EDITS = {
    "resize": _resize,
    "crop": lambda image, v: image.crop(tuple(v)),
    "convert": lambda image, v: image.convert(v[0]),
}


def _size(image: Any) -> tuple[int, int]:
    """Returns width and height in pixels."""
    if isinstance(image, Image.Image):
        return image.size
    height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2]
    return width, height


def _channels_first(keyword: str, image: Any) -> torch.Tensor:
    """Returns [channels, height, width] of an array or a real tensor: float64 if it has that type, else float32."""
    if isinstance(image, torch.Tensor):
        if image.is_complex():
            raise CallError(f"{keyword}: a tensor of {image.dtype}, required real numbers")
        tensor = image.detach().cpu()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        return tensor[None] if tensor.ndim == 2 else tensor
    if image.dtype.kind not in "fiub":
        raise CallError(f"{keyword}: an array of {image.dtype}, required real numbers")
    # A copy, as arrays may be turned round (`[..., ::-1]`) or read-only, and tensors not.
    array = np.array(image, np.float64 if image.dtype == np.float64 else np.float32, order="C")
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _resized(source: Mapping[str, Any], shape: Sequence[int], image: torch.Tensor) -> torch.Tensor:
    """Resizes numbers from 0 to 1 to the size of the input, as diffusers resizes tensors: by the nearest pixel."""
    keyword = source["keyword"]
    if image.numel() == 0:
        raise CallError(f"{keyword}: numbers of shape {tuple(image.shape)} (channels, height, width) are no image")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # which NaN is not either
        hint = ". Divide them by 255" if low >= 0 and 1 < high <= 255 else ""
        raise CallError(f"{keyword}: numbers from {low:g} to {high:g}, required from 0 to 1{hint}")
    sizes = {tuple(edit[1:3]) for edit in source["edits"] if edit[0] == "resize"}
    if len(sizes) > 1 or any(edit[0] == "crop" for edit in source["edits"]):
        raise CallError(f"{keyword}: this pipeline resizes or crops in several steps. Give a PIL image, not numbers")
    if not sizes or image.shape[1:] == tuple(shape[2:]):
        return image
    return torch.nn.functional.interpolate(image[None], size=tuple(shape[2:]))[0]
