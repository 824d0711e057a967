"""Specs of tiny pipelines whose calls several processes run together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkiln.compiler.compile import shared_calls_of
from diffkiln.program.exchange import Exchanged
from tests.passes.test_cache_schedule import spec

#: Families with one call of a doubled batch a step, and with two calls.
DOUBLED, TWICE = ("sdxl",), ("flux", "wan", "qwen_image")


def shared(root: Path, family: str, parallel: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """A guided spec of few steps for so many processes; without passes."""
    made = spec(root, family)
    made["passes"] = []
    made["inputs"]["num_inference_steps"] = steps
    if family == "flux":
        made["inputs"]["call"]["true_cfg_scale"] = 3.0
    if parallel:
        made["target"]["parallel"] = parallel
    return made


def exchange_of(made: dict[str, Any]) -> dict[str, dict[str, list[Exchanged]]]:
    """What each process sends in each step, by the variant's name and the program's."""
    found = shared_calls_of(made)
    return {name: {key: call.exchanged for key, call in calls.items()} for name, calls in found.items()}


def tiled(root: Path, parallel: dict[str, Any], side: int = 64) -> dict[str, Any]:
    """A FLUX-like spec whose images are decoded in tiles of 32 pixels."""
    made = shared(root, "flux", parallel, 1)
    made["passes"] = [{"name": "vae", "component": "vae", "tiling": True, "tile": 32}]
    made["inputs"] |= {"height": side, "width": side}
    return made
