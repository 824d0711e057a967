from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from diffkiln.bundle import sha256_bytes, sha256_file


def test_hashes_a_path_and_a_descriptor_and_reports_progress(tmp_path: Path) -> None:
    data = os.urandom(9_000_000)
    file = tmp_path / "file"
    file.write_bytes(data)
    steps: list[int] = []
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_file(file, steps.append) == expected == sha256_bytes(data)
    assert sum(steps) == len(data)
    assert len(steps) == 3
    with file.open("rb") as opened:
        opened.seek(100)
        assert sha256_file(opened.fileno()) == expected
        assert opened.tell() == 100


def test_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(__file__)
    with pytest.raises(OSError):
        sha256_file(tmp_path / "link")
