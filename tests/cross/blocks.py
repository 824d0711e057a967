"""Blocks of three families as they are recorded, in bfloat16: small ones, and FLUX.1-dev's at their true size."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diffkiln.compiler.compile import check
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import Program
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import record

#: Compute capability: a target that has it.
TARGETS = {"sm_80": "nvidia-a100-40gb", "sm_89": "nvidia-l4", "sm_90a": "nvidia-h200"}

#: A family's block: (family, component, region).
SMALL = {
    "Flux": ("flux", "transformer", "FluxTransformerBlock"),
    "SDXL": ("sdxl", "unet", "BasicTransformerBlock"),
    "Wan": ("wan", "transformer", "WanTransformerBlock"),
}


def small(name: str) -> Program:
    """The block of a small pipeline."""
    family, component, region = SMALL[name]
    return _regions(family)[component][region]


@cache
def _regions(family: str) -> Mapping[str, Mapping[str, Program]]:
    from tests.end_to_end.test_families import spec_of

    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        spec = spec_of(family, Path(folder))
        spec["source"]["dtype"] = "bfloat16"
        return _recorded(spec)


@cache
def flux_dev() -> Mapping[str, Program]:
    """FLUX.1-dev's blocks at 1024², 512 tokens of text, from its configuration alone."""
    inputs = {"height": 1024, "width": 1024, "num_inference_steps": 2, "call": {"max_sequence_length": 512}}
    source = {"architecture": "flux.1-dev", "seed": 0}
    spec = {"spec_version": 1, "source": source, "target": {"device": "cpu"}, "inputs": inputs}
    with quiet_libraries():
        return _recorded(spec)["transformer"]


def _recorded(spec: dict[str, Any]) -> Mapping[str, Mapping[str, Program]]:
    checked = check(spec)
    recording = record(checked.pipe, checked.requests, Constants())
    return {name: module.regions for name, module in recording.modules.items()}
