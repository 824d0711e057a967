"""How images become tensors, found by experiment.

The recording's images are *sentinels*: they have a size and a mode and no pixels, and write down what is done to them.
The pipeline's own image processor gives its tensor for blank pixels; that tensor becomes a marked input of the program.
Whatever looks at pixels anywhere else stops the recording.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import type_of
from diffkiln.record.sentinels import Sentinel, Sizes
from diffkiln.record.tape import Tape


def twice_the_images(sizes: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """For twice as many prompts: lists have an image for each, and one that is alone serves all."""
    return {keyword: size if isinstance(size[0], int) else (*size, *size) for keyword, size in sizes.items()}  # type: ignore[misc]


def sizes_as_json(sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """Sizes as a spec says them."""

    def written(size: Any) -> Any:
        if isinstance(size[0], int):
            return {"height": size[1], "width": size[0]}
        return [written(each) for each in size]

    return {keyword: written(size) for keyword, size in sizes.items()}


class ImageRecorder:
    """Stands in for the image processors while a call is recorded.

    Args:
        tape: where the tensors become marked inputs.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
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
            known = self._now is not None and isinstance(listed[0], Sentinel)
            return self._blank(listed) if known else to_numpy(images)

        encode = BaseImageProcessor.__call__

        def encoded(processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            return self._encoded(encode, processor, images, *args, **kwargs)

        with (
            mock.patch.object(BaseImageProcessor, "__call__", encoded),
            mock.patch.object(VaeImageProcessor, "preprocess", preprocessed),
            mock.patch.object(VaeImageProcessor, "pil_to_numpy", staticmethod(numbers)),
        ):
            yield

    def sources(self) -> dict[str, dict[str, Any]]:
        """What the size of each image had to be, by the name of the input, once the call has ended."""
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
        first = done[0]
        if any(image.edits != first.edits or image.origin.keyword != first.origin.keyword for image in done):
            raise RecordError(f"the pipeline treats the images of {first.origin.keyword} differently within a batch")
        source = {
            "kind": "image",
            "keyword": first.origin.keyword,
            "index": [image.origin.index for image in done],
            "edits": [list(edit) for edit in first.edits],
            "normalize": bool(processor.config.do_normalize),
            "binarize": bool(processor.config.do_binarize),
            "scaled": None,
        }
        marked = self.tape.new_input(first.origin.keyword, type_of(blank), source)
        self._made[self.tape.inputs[-1].name] = tuple(done)
        return marked

    def _encoded(self, original: Callable[..., Any], processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        from diffkiln.record.vision import encoded

        listed = images if isinstance(images, list) else [images]
        if args or not all(isinstance(item, Sentinel) for item in listed):
            return original(processor, images, *args, **kwargs)
        return encoded(self.tape, self._made, original, processor, listed, **kwargs)

    def _blank(self, images: Sequence[Sentinel]) -> np.ndarray[Any, Any]:
        """Pixels of the shape that `pil_to_numpy` would give."""
        self._now = list(images)
        channels = () if images[0]._mode == "L" else (len(images[0]._mode),)
        width, height = images[0]._size
        return np.zeros((len(images), height, width, *channels), np.float32)
