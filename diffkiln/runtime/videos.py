"""Frames to a video that browsers play."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image


def write_video(frames: Sequence[Any], file: str | BinaryIO, fps: float) -> None:
    """Writes H.264 in MP4: 4:2:0, and so with even sides, the last row and column repeated for odd ones.

    Args:
        frames: `PIL.Image`s of one size.
        file: A path, or a file that can seek.
        fps: Frames a second.

    Raises:
        ModuleNotFoundError: the package av, of the extra `video`, is not installed.
    """
    import av

    width, height = (side + side % 2 for side in frames[0].size)
    # To put the index first, which lets a video start while it is fetched, FFmpeg opens the file again by its name.
    options = {"movflags": "faststart"} if isinstance(file, str) else {}
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(_even(frame, width, height))))
        container.mux(stream.encode())


def write_animation(frames: Sequence[Any], file: Any, fps: float, form: str | None = None) -> None:
    """Writes an animated GIF or WebP; `form` is Pillow's name of the format, where the file's name does not say it."""
    quality = {"quality": 90} if str(form or file).lower().endswith("webp") else {}
    first, *others = frames
    first.save(file, form, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **quality)


def _even(frame: Any, width: int, height: int) -> Any:
    frame = frame.convert("RGB")
    if frame.size == (width, height):
        return frame
    padded = Image.new("RGB", (width, height))
    for x in (width - frame.width, 0):
        for y in (height - frame.height, 0):
            padded.paste(frame, (x, y))
    return padded
