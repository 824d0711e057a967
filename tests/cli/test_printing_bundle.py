"""The command that a new bundle is tried with: it works as it is printed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffkiln.cli.printing_bundle import trial


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({}, "--seed 7 --as-diffusers -o image.png"),
        ({"parallel": {"layers": 2}}, "--seed 7 --as-diffusers --processes 2 -o image.png"),
        ({"parallel": {"guidance": 2, "sequence": 4}}, "--seed 7 --as-diffusers --processes 8 -o image.png"),
    ],
    ids=["one process", "two", "a mesh"],
)
def test_a_bundle_of_several_processes_is_tried_with_as_many(runtime, words):
    manifest: Any = SimpleNamespace(runtime=runtime)
    assert trial(Path("bundle"), manifest, None) == f"diffkiln run bundle --prompt 'a red fox' {words}"
