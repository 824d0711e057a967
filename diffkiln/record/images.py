"""How images become tensors, found by experiment.

The recording's images are *sentinels*: they have a size and a mode and no pixels, and write down what is done to them.
The pipeline's own image processor gives its tensor for blank pixels; that tensor becomes a marked input of the program.
So do pixels that the pipeline turns into an array by itself, with which it goes on computing (diffkiln.record.arrays).
Whatever looks at pixels anywhere else stops the recording.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import DataDependent, RecordError
from diffkiln.interpreter.aten import type_of
from diffkiln.program import TensorType
from diffkiln.record.arrays import MarkedArray
from diffkiln.record.sentinels import Sentinel, Sizes
from diffkiln.record.tape import Tape


def twice_the_images(sizes: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """Returns the sizes for twice as many prompts: lists get an image for each, a single image serves all."""
    return {keyword: size if isinstance(size[0], int) else (*size, *size) for keyword, size in sizes.items()}  # type: ignore[misc]


def sizes_as_json(sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """Returns sizes as a spec writes them."""

    def written(size: Any) -> Any:
        if size is None:
            return None
        if isinstance(size[0], int):
            return {"height": size[1], "width": size[0]}
        return [written(each) for each in size]

    return {keyword: written(size) for keyword, size in sizes.items()}


class ImageRecorder:
    """The stand-in for image processors while a call is recorded.

    Args:
        tape: where the tensors become marked inputs.
        parts: of the pipeline, of which some prepare images for an encoder.
    """

    def __init__(self, tape: Tape, parts: Iterable[Any] = ()) -> None:
        self.tape, self._parts = tape, tuple(parts)
        self._made: dict[str, Sequence[Sentinel]] = {}
        self._now: list[Sentinel] | None = None  # those that a processor is at, from where their edits are done

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        from diffusers.image_processor import VaeImageProcessor
        from transformers import BaseImageProcessor

        preprocess, to_numpy = VaeImageProcessor.preprocess, VaeImageProcessor.pil_to_numpy

        def preprocessed(processor: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
            return self._preprocessed(preprocess, processor, image, *args, **kwargs)

        def numbers(images: Any) -> Any:
            listed = images if isinstance(images, list) else [images]
            if not isinstance(listed[0], Sentinel):
                return to_numpy(images)
            return self._blank(listed) if self._now is not None else self._pixels(listed)

        to_tensor = VaeImageProcessor.numpy_to_pt

        def tensor(numbers: Any) -> Any:
            return numbers.tensor if isinstance(numbers, _Pixels) else to_tensor(numbers)

        encode = BaseImageProcessor.__call__

        def encoded(processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            return self._encoded(encode, processor, images, *args, **kwargs)

        resize_and_crop = VaeImageProcessor._resize_and_crop

        def cropped(processor: Any, image: Any, width: int, height: int) -> Any:
            recorded = isinstance(image, Sentinel)
            return _cropped(image, width, height) if recorded else resize_and_crop(processor, image, width, height)

        def prepared(original: Callable[..., Any]) -> Callable[..., Any]:
            """Records the method that `__call__` calls, too, as some pipelines call it themselves."""
            return lambda processor, images, *args, **kwargs: self._encoded(
                original, processor, images, *args, **kwargs
            )

        with (
            contextlib.ExitStack() as stack,
            mock.patch.object(BaseImageProcessor, "__call__", encoded),
            mock.patch.object(VaeImageProcessor, "preprocess", preprocessed),
            mock.patch.object(VaeImageProcessor, "_resize_and_crop", cropped),
            mock.patch.object(VaeImageProcessor, "pil_to_numpy", staticmethod(numbers)),
            mock.patch.object(VaeImageProcessor, "numpy_to_pt", staticmethod(tensor)),
        ):
            for kind in {type(part) for part in self._parts if isinstance(part, BaseImageProcessor)}:
                stack.enter_context(mock.patch.object(kind, "preprocess", prepared(kind.preprocess)))
            yield

    def pixels(self, image: Any) -> MarkedArray | None:
        """Returns the bytes of an image, [height, width, channels] or [height, width], as a marked input; None of
        anything else."""
        if not isinstance(image, Sentinel):
            return None
        width, height = image.size
        channels = len(image.mode)
        source = {
            "kind": "image",
            "keyword": image.origin.keyword,
            "index": [image.origin.index],
            "edits": [list(edit) for edit in image.edits],
            "normalize": False,
            "binarize": False,
            "scaled": {"factor": 1.0},
        }
        marked = self.tape.new_input(image.origin.keyword, TensorType("float32", (1, channels, height, width)), source)
        self._made[self.tape.inputs[-1].name] = (image,)
        return MarkedArray(marked[0, 0] if channels == 1 else marked[0].permute(1, 2, 0), np.uint8)

    def sources(self) -> dict[str, dict[str, Any]]:
        """Returns the size that each image must have, by the name of the input, once the call has ended."""
        found: dict[str, dict[str, Any]] = {}
        for name, images in self._made.items():
            sizes = {image.origin.size for image in images if image.origin.looked_at}
            if len(sizes) > 1:
                raise RecordError(f"{images[0].origin.keyword}: images of several sizes become one tensor")
            found[name] = {"size": list(sizes.pop()) if sizes else None}
        return found

    def _preprocessed(self, original: Callable[..., Any], processor: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
        listed = image if isinstance(image, list) else [image]
        if not any(isinstance(item, Sentinel) for item in listed):
            return original(processor, image, *args, **kwargs)
        self._now = []
        with _disable_current_modes():
            blank = original(processor, image, *args, **kwargs)
        done, self._now = self._now, None
        return self._marked(done, type_of(blank), processor.config.do_normalize, processor.config.do_binarize)

    def _pixels(self, images: Sequence[Sentinel]) -> _Pixels:
        """Returns the pixels of images as numbers from 0 to 1, of which nothing but the tensor can be had."""
        if len({(image.plain_size, image.edits) for image in images}) > 1:
            raise RecordError(f"{images[0].origin.keyword}: images of several sizes become one tensor")
        for image in images:
            image.look()
        width, height = images[0].plain_size
        channels = 1 if images[0].plain_mode == "L" else len(images[0].plain_mode)
        type_ = TensorType("float32", (len(images), channels, height, width))
        return _Pixels(images[0].origin.keyword, self._marked(images, type_, False, False))

    def _marked(self, done: Sequence[Sentinel], type_: TensorType, normalize: bool, binarize: bool) -> torch.Tensor:
        """Returns a marked tensor that is made of images in this way."""
        first = done[0]
        if any(image.edits != first.edits or image.origin.keyword != first.origin.keyword for image in done):
            raise RecordError(f"the pipeline treats the images of {first.origin.keyword} differently within a batch")
        source = {
            "kind": "image",
            "keyword": first.origin.keyword,
            "index": [image.origin.index for image in done],
            "edits": [list(edit) for edit in first.edits],
            "normalize": bool(normalize),
            "binarize": bool(binarize),
            "scaled": None,
        }
        marked = self.tape.new_input(first.origin.keyword, type_, source)
        self._made[self.tape.inputs[-1].name] = tuple(done)
        return marked

    def _encoded(self, original: Callable[..., Any], processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        from diffkiln.record.vision import encoded, scaled

        if not args and self.tape.is_marked(images):
            return scaled(processor, images, **kwargs)
        listed = images if isinstance(images, list) else [images]
        if args or not all(isinstance(item, Sentinel) for item in listed):
            return original(processor, images, *args, **kwargs)
        return encoded(self.tape, self._made, original, processor, listed, **kwargs)

    def _blank(self, images: Sequence[Sentinel]) -> np.ndarray[Any, Any]:
        """Returns pixels of the shape that `pil_to_numpy` would give."""
        self._now = list(images)
        for image in images:
            image.look()  # a processor that does not resize gives pixels of the caller's own size
        channels = () if images[0]._mode == "L" else (len(images[0]._mode),)
        width, height = images[0]._size
        return np.zeros((len(images), height, width, *channels), np.float32)


def _cropped(image: Sentinel, width: int, height: int) -> Sentinel:
    """Does as `VaeImageProcessor._resize_and_crop`, which pastes what it has resized into a new image."""
    have, wanted = image.width / image.height, width / height
    columns = width if wanted > have else image.width * height // image.height
    rows = height if wanted <= have else image.height * width // image.width
    left, top = columns // 2 - width // 2, rows // 2 - height // 2
    resized = image.resize((columns, rows), resample=Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


class _Pixels:
    """An array of pixels that only becomes a tensor: whatever else is asked of it would read them."""

    def __init__(self, keyword: str, tensor: torch.Tensor) -> None:
        self.keyword, self.tensor = keyword, tensor

    def __getattr__(self, name: str) -> Any:
        raise DataDependent(
            f"the pipeline reads the pixels of {self.keyword} past its image processor ({name}), so its shapes or its "
            "control flow may change with the image"
        )
