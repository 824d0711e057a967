"""What is lowered besides blocks: whole components, what lies between, ranges of sizes, quantized blocks. All small."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from diffkiln.compiler.compile import check
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.program import Program
from diffkiln.program.sizes import Family, families
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record

#: Whole components of a small FLUX, what lies between its blocks, and the arithmetic between its denoiser's calls.
PARTS = {
    "CLIP": ("text_encoder", "text_encoder"),
    "T5": ("text_encoder_2", "text_encoder_2"),
    "VAE decoder": ("vae", "vae.decode"),
    "before the blocks": ("transformer", "between"),
    "after the blocks": ("transformer", "between-2"),
    "scheduler": ("scheduler", "step"),
}
_WHOLE = ("text_encoder", "text_encoder_2", "vae")
_PASSES = [
    *({"name": "compile", "component": name, "scope": "whole"} for name in _WHOLE),
    {"name": "compile", "component": "transformer", "scope": "blocks", "between": True},
    {"name": "compile", "component": "scheduler"},
]

#: torchao's types, in which a FLUX block's linear layers are kept or computed.
QUANTIZED = ("int8_weight_only", "int8_dynamic", "int4_weight_only", "float8_weight_only", "float8_dynamic")

_SIZES = {"min": 64, "max": 96, "step": 32}


def flux(passes: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    """A spec of the small FLUX in bfloat16 for an L4; it is read while the folder that it names is there."""
    from tests.end_to_end.test_families import spec_of

    spec = spec_of("flux", _folder())
    spec["source"]["dtype"] = "bfloat16"
    return spec | {"target": {"device": "cuda", "gpu": "nvidia-l4"}, "passes": passes} | changed


@cache
def _folder() -> Path:
    return Path(_kept().name)


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="diffkiln-cross-")


def part(name: str) -> Program:
    """One of `PARTS`."""
    component, region = PARTS[name]
    return of_all().modules[component].regions[region]


@cache
def of_all() -> Recording:
    """The recording that has `PARTS`."""
    return rewritten(flux(_PASSES))


def quantized(kind: str) -> Program:
    """The double block with its linear layers in one of the types of `QUANTIZED`."""
    return quantized_recording(kind).modules["transformer"].regions["FluxTransformerBlock"]


def quantized_recording(kind: str) -> Recording:
    passes = [
        {"name": "quantize", "component": "transformer", "type": kind},
        {"name": "compile", "component": "transformer"},
    ]
    return rewritten(flux(passes))


def ranged(component: str) -> Family:
    """The first of a component's regions that four sizes share."""
    shared = next(family for family in families(list(ranges().modules[component].regions.values())) if family.ranges)
    assert len(shared.members) > 1
    return shared


@cache
def ranges() -> Recording:
    """The recording of four sizes."""
    whole = {"name": "compile", "component": "vae", "scope": "whole"}
    rest = [{"name": "compile", "component": name} for name in ("transformer", "scheduler")]
    spec = flux([whole, *rest])
    spec["inputs"] |= {"height": _SIZES, "width": _SIZES, "num_inference_steps": 2}
    return rewritten(spec)


def rewritten(spec: dict[str, Any]) -> Recording:
    """The recording as `compile` lowers it."""
    with quiet_libraries():
        checked = check(spec)
        recording = record(checked.pipe, checked.requests, Constants())
        manager.check_recording(recording, checked.listed, checked.targets)
        return manager.rewrite(recording, checked.listed)[0]
