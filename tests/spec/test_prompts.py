"""Files of prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffkiln.errors import SourceError
from diffkiln.spec.prompts import digest_of, read_prompts


def test_each_line_that_is_not_empty_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(" a fox\n\n  \nein Ofen, weiß\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a fox", "ein Ofen, weiß"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no text file"):
        read_prompts(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_refused_at_its_place(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n" * 400_000)
    with pytest.raises(SourceError, match=r"^\$\.quality\[0\]\.prompts: .* of at most 1 MB\. Write one") as caught:
        read_prompts(tmp_path / "prompts.txt", "$.quality[0].prompts")
    assert caught.value.problems[0].where == "$.quality[0].prompts"
    assert len(read_prompts(tmp_path / "prompts.txt", most=2**24)) == 400_000


def test_what_stands_for_prompts_follows_their_order() -> None:
    assert digest_of(["a", "b"]) == digest_of(("a", "b")) != digest_of(["b", "a"])
