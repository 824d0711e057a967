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
from PIL import Image
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.aten import type_of
from diffkiln.errors import DataDependent, RecordError
from diffkiln.program.images import is_edits
from diffkiln.record.tape import Tape

#: Width and height of one image, or of each in a list.
Sizes = tuple[int, int] | tuple[tuple[int, int], ...]


class Sentinel(Image.Image):
    """An image of some keyword that has no pixels.

    Args:
        origin: what is shared by all that is made of one image.
        size: width and height in pixels.
        edits: what was done to it, in the words of `diffkiln.program.images`.
    """

    def __init__(self, origin: _Origin, size: tuple[int, int], mode: str = "RGB", edits: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self._size, self._mode = size, mode
        self.origin, self.edits = origin, edits

    @property
    def size(self) -> tuple[int, int]:
        self.look()
        return self._size

    def look(self) -> None:
        """Note that what follows depends on the size; not on that of the caller's image, where it was resized."""
        self.origin.looked_at |= not any(edit[0] == "resize" for edit in self.edits)

    @property
    def plain_size(self) -> tuple[int, int]:
        """The size, for the recorder's own use."""
        return self._size

    def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Sentinel:
        if box is not None or reducing_gap is not None:
            raise RecordError(f"the pipeline resizes {self.origin.keyword} by parts, which diffkiln does not record")
        width, height = map(int, size)
        name = Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample).name.lower()
        return self._edited(("resize", width, height, name), size=(width, height))

    def crop(self, box: Any = None) -> Sentinel:
        if box is None:
            return self
        left, top, right, bottom = map(int, box)
        return self._edited(("crop", left, top, right, bottom), size=(right - left, bottom - top))

    def convert(self, mode: str | None = None, *args: Any, **kwargs: Any) -> Sentinel:
        if mode is None or args or kwargs:
            raise RecordError(f"the pipeline converts {self.origin.keyword} in a way that diffkiln does not record")
        return self._edited(("convert", mode), mode=mode)

    def copy(self) -> Sentinel:
        return self

    def _edited(self, edit: tuple[Any, ...], size: tuple[int, int] | None = None, mode: str = "") -> Sentinel:
        if not is_edits([edit]):
            raise RecordError(
                f"the pipeline edits {self.origin.keyword} in a way that diffkiln does not record: {edit}"
            )
        return Sentinel(self.origin, size or self._size, mode or self._mode, (*self.edits, edit))

    def _refuse(self, *_args: Any, **_kwargs: Any) -> Any:
        raise DataDependent(
            f"the pipeline reads the pixels of {self.origin.keyword} past its image processor, so its shapes or its "
            "control flow may change with the image"
        )

    load = tobytes = getdata = getpixel = paste = _refuse  # type: ignore[assignment]
    im = property(_refuse, lambda _self, _value: None)  # type: ignore[assignment]
    __array_interface__ = property(_refuse)  # type: ignore[assignment]


class _Origin:
    """One image of the caller's: its keyword, its place in the list, and whether the pipeline looked at its size."""

    def __init__(self, keyword: str, index: int, size: tuple[int, int]) -> None:
        self.keyword, self.index, self.size = keyword, index, size
        self.looked_at = False


def sentinels(sizes: Mapping[str, Sizes]) -> dict[str, Any]:
    """Keyword → a sentinel, or a list of them, as the call takes them."""
    return {keyword: _sentinels(keyword, size) for keyword, size in sizes.items()}


def _sentinels(keyword: str, sizes: Sizes) -> Any:
    if isinstance(sizes[0], int):
        return Sentinel(_Origin(keyword, 0, sizes), sizes)  # type: ignore[arg-type]
    return [Sentinel(_Origin(keyword, index, size), size) for index, size in enumerate(sizes)]  # type: ignore[arg-type]


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
