"""Files that the command line writes: pictures, animations, arrays and videos, by the ending of their name."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import click

from diffkiln.errors import MissingDependency

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOVING = (".gif", ".webp")
ARRAY, VIDEO = ".npy", ".mp4"

#: What pictures are called in a sentence; the others are written too.
_NAMED = ".png, .jpg, .webp, .gif, .npy or .mp4"
StorageFormat = Literal["pil", "np"]


def format_for(output: Path, videos: bool | None = None) -> StorageFormat:
    """Returns the `output_type` that a call must have for a file of this name.

    Args:
        output: file to write.
        videos: whether the call gives videos; None where that is not known yet.

    Raises:
        click.BadParameter: the name or its folder will not do.
        MissingDependency: the ending needs a package that is not installed.
    """
    ending = output.suffix.lower()
    if not output.absolute().parent.is_dir():
        raise _refused(f"there is no folder {output.parent}. Make it first, or name another")
    if output.is_dir():
        raise _refused(f"{output} is a folder. Name a file in it, such as {output / 'image.png'}")
    if ending not in (*PICTURES, ARRAY, VIDEO):
        what = f"{ending} is no ending that can be written" if ending else f"the name {output.name} has no ending"
        raise _refused(f"{what}. Use {_NAMED}")
    if videos is True and ending not in (*MOVING, ARRAY, VIDEO):
        raise _refused(f"the bundle makes videos, and {ending} holds one picture. Use .mp4, .gif, .webp or .npy")
    if videos is False and ending == VIDEO:
        raise _refused("the bundle makes pictures, not videos. Use .png, .jpg, .webp, .gif or .npy")
    if ending == VIDEO:
        _need_av()
    return "np" if ending == ARRAY else "pil"


def save(made: Any, output: Path, fps: float = 16) -> list[Path]:
    """Writes the result of a call; of several images or videos each into a numbered file.

    Args:
        made: images, or videos as lists of images; for `.npy` an array, which becomes one file.
        output: file to write; its ending says how.
        fps: frames a second of a video.

    Raises:
        click.ClickException: a file cannot be written.
    """
    try:
        if output.suffix.lower() == ARRAY:
            return [_save_array(made, output)]
        items = list(made)
        paths = numbered(output, len(items))
        for item, path in zip(items, paths, strict=True):
            _save_one(item, path, fps)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{output} cannot be written: {error}") from error
    return paths


def numbered(output: Path, count: int) -> list[Path]:
    """Returns the names of `count` files: the one given, or numbered ones beside it."""
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(count)]


def _save_array(made: Any, path: Path) -> Path:
    import numpy as np

    np.save(path, np.asarray(made), allow_pickle=False)
    return path


def _save_one(item: Any, path: Path, fps: float) -> None:
    ending = path.suffix.lower()
    if not isinstance(item, list):
        item.convert("RGB").save(path) if ending in (".jpg", ".jpeg") else item.save(path)
    elif ending == VIDEO:
        _save_video(item, path, fps)
    elif ending in MOVING:
        options = {"quality": 90} if ending == ".webp" else {}
        item[0].save(path, save_all=True, append_images=item[1:], duration=round(1000 / fps), loop=0, **options)
    else:
        raise _refused(f"the call gave a video, and {ending} holds one picture. Use .mp4, .gif, .webp or .npy")


def _save_video(frames: Sequence[Any], path: Path, fps: float) -> None:
    """Writes H.264 that browsers play: 4:2:0, and so with even sides, the last row and column repeated for odd ones."""
    import av

    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(_even(frame, width, height))))
        container.mux(stream.encode())


def _even(frame: Any, width: int, height: int) -> Any:
    from PIL import Image

    frame = frame.convert("RGB")
    if frame.size == (width, height):
        return frame
    padded = Image.new("RGB", (width, height))
    for x in (width - frame.width, 0):
        for y in (height - frame.height, 0):
            padded.paste(frame, (x, y))
    return padded


def _need_av() -> None:
    from importlib.util import find_spec

    if find_spec("av") is None:
        raise MissingDependency(
            "Writing .mp4 needs the package av, which is not installed: pip install 'diffkiln[video]'. Or write .gif "
            "or .webp, which need nothing more"
        )


def _refused(reason: str) -> click.BadParameter:
    return click.BadParameter(reason, param_hint="'-o' / '--output'")
