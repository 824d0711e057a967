"""What the command line prints."""

from __future__ import annotations

import io
import sys

import pytest

from diffkiln.cli.printing import Watch, size_of


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
