"""Images without pixels, which write down what a pipeline does to them while it is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from diffkiln.errors import DataDependent, RecordError
from diffkiln.program.images import is_edits

#: Width and height of one image, or of each in a list, which may be one of lists. None is a place without an image.
Sizes = tuple[Any, ...]


def each_size(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Yields width and height of every image, in their order."""
    if sizes and isinstance(sizes[0], int):
        yield sizes  # type: ignore[misc]
        return
    for item in sizes:
        if item is not None:
            yield from each_size(item)


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
        """Notes that later steps depend on the image's size; a resized image does not depend on the caller's."""
        self.origin.looked_at |= not any(edit[0] == "resize" for edit in self.edits)

    @property
    def plain_size(self) -> tuple[int, int]:
        """Returns the size, for the recorder's own use."""
        return self._size

    @property
    def plain_mode(self) -> str:
        """Returns the mode, for the recorder's own use."""
        return self._mode

    def resize(self, size: Any, resample: Any = None, box: Any = None, reducing_gap: Any = None) -> Sentinel:
        if box is not None:
            raise RecordError(f"the pipeline resizes {self.origin.keyword} by parts, which diffkiln does not record")
        width, height = map(int, size)
        name = Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample).name.lower()
        rest = () if reducing_gap is None else (float(reducing_gap),)
        return self._edited(("resize", width, height, name, *rest), size=(width, height))

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
    """Returns keyword → a sentinel, or a list of them, as the call takes them."""
    return {keyword: _sentinels(keyword, size) for keyword, size in sizes.items()}


def _sentinels(keyword: str, sizes: Sizes) -> Any:
    count = itertools.count()

    def made(size: Any) -> Any:
        if size is None:
            return None
        if isinstance(size[0], int):
            return Sentinel(_Origin(keyword, next(count), size), size)
        return [made(item) for item in size]

    return made(sizes)
