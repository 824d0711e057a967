"""What the command line prints."""

from __future__ import annotations

import io
import sys

import pytest
from PIL import Image

from diffkiln.printing import Watch, save, size_of


def test_steps_are_plain_lines_where_there_is_no_terminal(capsys):
    with Watch() as watch:
        watch("check")
        watch("record")
    assert capsys.readouterr().err == "check\nrecord\n"


def test_steps_are_shown_live_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Watch() as watch:
        watch("check")
        watch("record")
    assert "record" in terminal.getvalue()
    assert "\x1b" in terminal.getvalue()


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.50 GB")])
def test_sizes(count, text):
    assert size_of(count) == text


def test_several_images_are_numbered_and_videos_move(tmp_path):
    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert [path.name for path in save(pictures, tmp_path / "out.png")] == ["out-0.png", "out-1.png"]
    (video,) = save([pictures], tmp_path / "out.gif")
    with Image.open(video) as moving:
        assert moving.n_frames == 2
