"""Files that the command line writes, by the ending of their name."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import click
import numpy as np
import pytest
from PIL import Image

from diffkiln.cli.output_files import format_for, save
from diffkiln.errors import MissingDependency


def pictures(size=(4, 4)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in ("red", "blue")]


def test_several_images_are_numbered_and_videos_move(tmp_path):
    assert [path.name for path in save(pictures(), tmp_path / "out.png")] == ["out-0.png", "out-1.png"]
    (video,) = save([pictures()], tmp_path / "out.gif")
    with Image.open(video) as moving:
        assert moving.n_frames == 2


@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPEG", ".webp", ".gif", ".bmp", ".tif"])
def test_a_picture_is_written_by_its_ending(tmp_path, ending):
    (path,) = save(pictures((6, 4))[:1], tmp_path / f"out{ending}")
    with Image.open(path) as image:
        assert image.size == (6, 4)


def test_a_picture_with_transparency_can_be_a_jpeg(tmp_path):
    (path,) = save([Image.new("RGBA", (4, 4))], tmp_path / "out.jpg")
    with Image.open(path) as image:
        assert image.mode == "RGB"


def test_webp_holds_every_frame_of_a_video(tmp_path):
    (path,) = save([pictures()], tmp_path / "out.webp", fps=8)
    with Image.open(path) as moving:
        assert moving.n_frames == 2


def test_an_array_is_one_file_of_all_images(tmp_path):
    made = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 2, 2, 3)
    (path,) = save(made, tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), made)


@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
def test_a_video_has_its_frames_its_rate_and_even_sides(tmp_path, size):
    (path,) = save([pictures(size) * 5], tmp_path / "out.mp4", fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert (stream.average_rate, stream.codec_context.pix_fmt) == (8, "yuv420p")
    assert len(frames) == 10
    assert {frame.shape[:2] for frame in frames} == {tuple(side + side % 2 for side in reversed(size))}
    assert frames[0][-1, -1, 0] > 200  # the colour of the picture, also where it was padded
    assert frames[0][-1, -1, 2] < 60


def test_several_videos_are_numbered(tmp_path):
    paths = save([pictures((16, 16))] * 2, tmp_path / "out.mp4")
    assert [path.name for path in paths] == ["out-0.mp4", "out-1.mp4"]


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("image", None, "has no ending. Use .png"),
        ("image.xyz", None, ".xyz is not an ending that diffkiln can write"),
        ("nowhere/image.png", None, "there is no folder"),
        ("clip.png", "videos", "the bundle makes videos"),
        ("image.mp4", "pictures", "the bundle makes pictures"),
        ("image.wav", "pictures", "makes pictures, and .wav holds none"),
        ("sound.png", "sound", "makes sound, and .png holds none. Use .wav or .npy"),
        ("made.png", "tensors", "makes tensors, and .png holds none. Use .npy"),
        (".", None, "is a folder"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_one_that_will(tmp_path, name, made, words):
    with pytest.raises(click.BadParameter) as caught:
        format_for(tmp_path / name, made)
    assert words in str(caught.value)


def test_a_name_says_what_the_call_must_give(tmp_path):
    assert format_for(tmp_path / "out.npy") == "np"
    assert {format_for(tmp_path / f"out{end}", "videos") for end in (".gif", ".webp", ".mp4")} == {"pil"}


def test_video_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'diffkiln\[video\]'"):
        format_for(tmp_path / "out.mp4")


def test_a_video_that_turns_up_for_a_picture_is_refused(tmp_path):
    with pytest.raises(click.BadParameter, match="the call gave a video"):
        save([pictures()], tmp_path / "out.png")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(click.ClickException, match=r"out\.png cannot be written"):
        save(pictures()[:1], tmp_path / "out.png")


def test_pictures_need_no_video_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert save(pictures()[:1], Path(tmp_path / "out.png"))
