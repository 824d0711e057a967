"""Files that the command line writes: pictures, animations, arrays and videos, by the ending of their name."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any, Literal

import click

from diffkiln.errors import MissingDependency

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOVING = (".gif", ".webp")
ARRAY, VIDEO, SOUND = ".npy", ".mp4", ".wav"

#: What pictures are called in a sentence; the others are written too.
_NAMED = ".png, .jpg, .webp, .gif, .npy, .mp4 or .wav"
StorageFormat = Literal["pil", "np"]
#: What a call gives, as far as files are concerned.
Made = Literal["pictures", "videos", "sound", "tensors"]
_ENDINGS: dict[Made, tuple[str, ...]] = {
    "pictures": (*PICTURES, ARRAY),
    "videos": (*MOVING, ARRAY, VIDEO),
    "sound": (SOUND, ARRAY),
    "tensors": (ARRAY,),
}


def format_for(output: Path, made: Made | None = None) -> StorageFormat:
    """Returns the `output_type` that a call must have for a file of this name.

    Args:
        output: file to write.
        made: what the call gives; None where that is not known yet.

    Raises:
        click.BadParameter: the name or its folder will not do.
        MissingDependency: the ending needs a package that is not installed.
    """
    ending = output.suffix.lower()
    if not output.absolute().parent.is_dir():
        raise _refused(f"there is no folder {output.parent}. Make it first, or name another")
    if output.is_dir():
        raise _refused(f"{output} is a folder. Name a file in it, such as {output / 'image.png'}")
    if ending not in (*PICTURES, ARRAY, VIDEO, SOUND):
        what = (
            f"{ending} is not an ending that diffkiln can write" if ending else f"the name {output.name} has no ending"
        )
        raise _refused(f"{what}. Use {_NAMED}")
    if made == "videos" and ending in PICTURES and ending not in MOVING:
        raise _refused(f"the bundle makes videos, and {ending} holds one picture. Use .mp4, .gif, .webp or .npy")
    if made == "pictures" and ending == VIDEO:
        raise _refused("the bundle makes pictures, not videos. Use .png, .jpg, .webp, .gif or .npy")
    if made is not None and ending not in _ENDINGS[made]:
        raise _refused(f"the bundle makes {made}, and {ending} holds none. Use {' or '.join(_ENDINGS[made])}")
    if ending == VIDEO:
        _need_av()
    return "np" if ending in (ARRAY, SOUND) else "pil"


def save(made: Any, output: Path, fps: float = 16, rate: int | None = None) -> list[Path]:
    """Writes the result of a call; of several images or videos each into a numbered file.

    Args:
        made: images, or videos as lists of images; for `.npy` an array, which becomes one file.
        output: file to write; its ending says how.
        fps: frames a second of a video.
        rate: samples a second of sound.

    Raises:
        click.ClickException: a file cannot be written.
    """
    try:
        if output.suffix.lower() == ARRAY:
            return [_save_array(made, output)]
        items = list(made)
        paths = numbered(output, len(items))
        for item, path in zip(items, paths, strict=True):
            if path.suffix.lower() == SOUND:
                _save_sound(item, path, rate)
            else:
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


def _save_sound(sound: Any, path: Path, rate: int | None) -> None:
    """Writes samples from -1 to 1, [channels, samples] or one channel's, at 16 bits."""
    import numpy as np

    if rate is None:
        raise _refused("the pipeline does not say how many samples of its sound make a second. Use .npy")
    samples = np.atleast_2d(np.nan_to_num(np.asarray(sound, np.float32)))
    numbers = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(numbers))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(numbers.T.tobytes())


def _save_one(item: Any, path: Path, fps: float) -> None:
    from diffkiln.runtime.videos import write_animation, write_video

    ending = path.suffix.lower()
    if not isinstance(item, list):
        item.convert("RGB").save(path) if ending in (".jpg", ".jpeg") else item.save(path)
    elif ending == VIDEO:
        write_video(item, str(path), fps)
    elif ending in MOVING:
        write_animation(item, path, fps)
    else:
        raise _refused(f"the call gave a video, and {ending} holds one picture. Use .mp4, .gif, .webp or .npy")


def _need_av() -> None:
    from importlib.util import find_spec

    if find_spec("av") is None:
        raise MissingDependency(
            "Writing .mp4 needs the package av, which is not installed: pip install 'diffkiln[video]'. Or write .gif "
            "or .webp, which need nothing more"
        )


def _refused(reason: str) -> click.BadParameter:
    return click.BadParameter(reason, param_hint="'-o' / '--output'")
