"""Specs of tiny pipelines whose calls several processes run together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.passes.test_cache_schedule import spec

#: Families with one call of a doubled batch a step, and with two calls.
DOUBLED, TWICE = ("sdxl",), ("flux", "wan", "qwen_image")


def shared(root: Path, family: str, parallel: dict[str, int], steps: int = 2) -> dict[str, Any]:
    """A guided spec of few steps for so many processes; without passes."""
    made = spec(root, family)
    made["passes"] = []
    made["inputs"]["num_inference_steps"] = steps
    if family == "flux":
        made["inputs"]["call"]["true_cfg_scale"] = 3.0
    if parallel:
        made["target"]["parallel"] = parallel
    return made
