"""The safety checker of a pipeline: what looks at finished images, and makes those black that it objects to.

diffusers makes pictures of the images, has a processor prepare them as for any image encoder, and reads what the
checker finds. Here the same is written down in operations on tensors: a picture is numbers from 0 to 255, and Pillow's
resizing is sums of whole numbers, which float64 holds exactly. Whether an image is made lighter afterwards, as those
are that were not objected to, is a choice between two tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from diffkiln.errors import RecordError
from diffkiln.record.arrays import MarkedArray
from diffkiln.record.resizing import resized
from diffkiln.record.tape import Tape
from diffkiln.record.vision import prepared

CHECKER = "safety_checker"
#: The field of a result that says which images were objected to, and the method that finds out.
FLAGS, CHECK = "nsfw_content_detected", "run_safety_checker"
_OMIT = f'To have it left out, set "omit": ["{CHECKER}"] in the source'


class Drawn:
    """In the place of a picture: an image of the call, [channels, height, width], from 0 to 1."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def size(self) -> tuple[int, int]:
        """Returns width and height."""
        return self.tensor.shape[-1], self.tensor.shape[-2]


class SafetyRecorder:
    """Writes down the check of finished images while a call is recorded.

    Args:
        tape: of the call.
        pipe: the pipeline, with or without a checker.
    """

    def __init__(self, tape: Tape, pipe: Any) -> None:
        self._tape, self._pipe = tape, pipe
        self._flags: torch.Tensor | None = None
        self._checks = getattr(pipe, CHECKER, None) is not None

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Lets the pipeline check tensors, inside the `with` block."""
        if not self._checks:
            yield
            return
        from diffusers.image_processor import VaeImageProcessor
        from transformers import BaseImageProcessor

        post, prepare = VaeImageProcessor.postprocess, BaseImageProcessor.__call__
        lighten, to_pictures = VaeImageProcessor._denormalize_conditionally, VaeImageProcessor.numpy_to_pil

        def postprocess(processor: Any, image: Any, output_type: str = "pil", *args: Any, **kwargs: Any) -> Any:
            if output_type != "pil" or not self._tape.is_marked(image):
                return post(processor, image, output_type, *args, **kwargs)
            made: Any = post(processor, image, "pt", *args, **kwargs)
            return [Drawn(each) for each in made]

        def pictures(images: Any) -> Any:
            if not isinstance(images, MarkedArray):
                return to_pictures(images)
            return [Drawn(each) for each in images.marked.movedim(-1, -3)]

        def call(processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            listed = images if isinstance(images, list) else [images]
            if not listed or not all(isinstance(each, Drawn) for each in listed):
                return prepare(processor, images, *args, **kwargs)
            return _prepared(processor, listed)

        def conditionally(processor: Any, images: torch.Tensor, wanted: Any = None) -> torch.Tensor:
            made = lighten(processor, images, wanted)
            # Those that were objected to stay as they are.
            return made if self._flags is None else torch.where(_beside(self._flags, images), images, made)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(VaeImageProcessor, "postprocess", postprocess))
            stack.enter_context(mock.patch.object(VaeImageProcessor, "numpy_to_pil", staticmethod(pictures)))
            stack.enter_context(mock.patch.object(BaseImageProcessor, "__call__", call))
            stack.enter_context(mock.patch.object(VaeImageProcessor, "_denormalize_conditionally", conditionally))
            if callable(check := getattr(type(self._pipe), CHECK, None)):
                stack.enter_context(mock.patch.object(type(self._pipe), CHECK, self._checked(check)))
            yield

    def _checked(self, check: Callable[..., Any]) -> Callable[..., Any]:
        def around(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            image, *found = check(pipe, *args, **kwargs)
            if self._flags is not None:
                raise RecordError(f"the call checks images twice, which is not recorded. {_OMIT}")
            self._flags = found[0]
            # The pipeline asks of each whether it was objected to, and none is before the program runs.
            return image, [False] * found[0].shape[0], *found[1:]

        return around

    def completed(self, result: Any) -> Any:
        """Returns the call's result, with a tensor of what was objected to.

        Raises:
            RecordError: there is a checker, and the call does not ask it.
        """
        if not self._checks:
            return result
        if self._flags is None or FLAGS not in result:
            kind = type(self._pipe).__name__
            raise RecordError(f"{kind} gives tensors without having its {CHECKER} look at them. {_OMIT}")
        result[FLAGS] = self._flags
        return result


def _beside(flags: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return flags.reshape(-1, *[1] * (images.ndim - 1))


def _prepared(processor: Any, images: Sequence[Drawn]) -> Any:
    """Returns what a processor gives for pictures, computed from their numbers."""
    from transformers import BatchFeature

    edits, scaled = prepared(processor, images[0].size)
    numbers = torch.stack([image.tensor for image in images]).float()
    numbers = (numbers * 255).round().to(torch.float64)
    for name, *values in edits:
        if name == "resize":
            numbers = resized(numbers, values[0], values[1], values[2])
        elif name == "crop":
            left, top, right, bottom = values
            if left < 0 or top < 0 or right > numbers.shape[-1] or bottom > numbers.shape[-2]:
                raise RecordError(f"the images are smaller than the {CHECKER} crops them to. {_OMIT}")
            numbers = numbers[..., top:bottom, left:right]
    numbers = (numbers * scaled["factor"]).float()
    if "mean" in scaled:
        mean, std = (torch.tensor(scaled[name], dtype=torch.float32).reshape(1, -1, 1, 1) for name in ("mean", "std"))
        numbers = (numbers - mean) / std
    return BatchFeature({"pixel_values": numbers})


def checks_images(pipeline: type) -> bool:
    """Returns True if a pipeline class takes a safety checker."""
    return CHECKER in inspect.signature(pipeline.__init__).parameters
