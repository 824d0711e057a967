"""Image files of the command line."""

from __future__ import annotations

import click
import pytest
from PIL import Image

from diffkiln.cli.image_files import read_images
from diffkiln.cli.output_files import save


def test_images_are_read_for_their_keywords(tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "a=b.png"
    Image.new("RGBA", (4, 6), "red").save(one)
    Image.new("L", (8, 8)).save(other)
    assert read_images([]) == {}
    read = read_images([str(one), f"mask_image={other}", f"control_image={one}", f"control_image={other}"])
    assert set(read) == {"image", "mask_image", "control_image"}
    assert (read["image"].mode, read["image"].size) == ("RGB", (4, 6))
    assert [image.size for image in read["control_image"]] == [(4, 6), (8, 8)]
    assert read_images([str(other)])["image"].size == (8, 8)


def test_an_image_is_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 6)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_images([str(tmp_path / "photo.jpg")])["image"].size == (6, 4)


def test_an_animation_is_a_video_and_its_first_frame_an_image(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    (path,) = save([frames], tmp_path / "clip.gif")
    read = read_images([str(path), f"video={path}"])
    assert read["image"].getpixel((0, 0)) == (255, 0, 0)
    assert [frame.getpixel((0, 0)) for frame in read["video"]] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_file_of_more_than_eight_bits_is_refused(tmp_path, mode):
    """Pillow would make it white."""
    path = tmp_path / "deep.tif"
    Image.new(mode, (4, 4), 4096).save(path)
    with pytest.raises(click.BadParameter, match=r"deep\.tif .* more than eight bits\. Save it with eight"):
        read_images([str(path)])


def test_a_keyword_that_takes_no_image_is_told(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(click.BadParameter, match=r"No such file.*Keywords of images are image, images, mask_image"):
        read_images([f"mask={tmp_path}/mask.png"])


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(click.BadParameter, match=rf"{name} cannot be read as an image"):
            read_images([str(tmp_path / name)])
