"""Pictures and videos as files: those that clients send, and those that they get."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image, ImageOps

from diffkiln.program.images import DEEP
from diffkiln.runtime.videos import write_animation, write_video
from diffkiln.serving.refusals import Refusal

#: Formats that clients may send: their readers are the ones that are fuzzed most.
_READ = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "mp4": "video/mp4",
}  # fmt: skip


def decode(data: bytes, param: str, pixels: int) -> Image.Image:
    """Returns an image that a client sent, RGB and turned as its camera says.

    Of an animation it is the first frame. The size is looked at before anything is unpacked, so that a small file
    cannot become a huge image.

    Args:
        data: The file.
        param: The field that it came in.
        pixels: The most that it may have.

    Raises:
        Refusal: it is no image of a known format, broken, too large, or of more than eight bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_READ) as image:
            reason = _refused(image, pixels)
            if not reason:
                return (ImageOps.exif_transpose(image) or image).convert("RGB")
    except Exception:  # whatever Pillow raises for broken files
        reason = f"this is no image that can be read. Send a whole {', '.join(_READ[:-1])} or {_READ[-1]}"
    raise Refusal(400, f"{param}: {reason}", param)


def encode(picture: Any, ending: str, quality: int, fps: float) -> bytes:
    """Returns the file of an image, or of a video, which is a list of images.

    Args:
        picture: What the pipeline gives.
        ending: "png", "jpeg" or "webp"; for videos "mp4", "gif" or "webp".
        quality: In percent, of "jpeg" and "webp".
        fps: Frames a second of a video.
    """
    file = io.BytesIO()
    if isinstance(picture, list):
        write_video(picture, file, fps) if ending == "mp4" else write_animation(picture, file, fps, ending)
    elif ending == "png":
        picture.save(file, "PNG")
    else:
        picture.convert("RGB").save(file, ending.upper(), quality=quality)
    return file.getvalue()


def preview_ending(ending: str) -> str:
    """Returns the format of previews for results in a format: the same for images, "webp" for videos."""
    return ending if ending in ("png", "jpeg") else "webp"


def preview_of(picture: Any, ending: str, quality: int) -> bytes:
    """Returns the file of a preview: of an image the whole, of a video its middle frame.

    Args:
        picture: What the pipeline gives: an image, or a list of them.
        ending: Format of the result that it is a preview of.
        quality: In percent, of "jpeg" and "webp".
    """
    frame = picture[len(picture) // 2] if isinstance(picture, list) else picture
    return encode(frame, preview_ending(ending), quality, 1.0)


def _refused(image: Image.Image, pixels: int) -> str:
    width, height = image.size
    if width * height > pixels:
        return f"{width} x {height} pixels are more than the {pixels:,} that are accepted. Make it smaller"
    if image.mode.startswith(DEEP):
        return f"an image of mode {image.mode!r} has more than eight bits. Save it with eight"
    return ""
