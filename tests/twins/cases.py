"""The regions that have twins: small pipelines in bfloat16, as `compile` lowers them for a GPU.

`SAMPLE` is run by `make test-more`, the others of `CASES` by `make test-twin`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffkiln.program import Program
from diffkiln.program.sizes import Family, families
from diffkiln.record.pipeline import Recording
from tests.cross import parts
from tests.exporters import regions

L4, H200 = "nvidia-l4", "nvidia-h200"


@dataclass(frozen=True)
class Case:
    """A region to lower for a target.

    Attributes:
        members: the sizes that its twin is run at.
        cudnns: whether convolutions have cuDNN's layout, or the one that torch expects where it finds no GPU.
    """

    region: Program
    members: tuple[Program, ...]
    constants: Mapping[str, torch.Tensor]
    target: str
    family: Family | None = None
    cudnns: bool = True


def _one(recording: Recording, component: str, region: str, target: str = L4) -> Case:
    program = recording.modules[component].regions[region]
    return Case(program, (program,), recording.constants.tensors, target)


def _part(name: str) -> Callable[[], Case]:
    return lambda: _one(parts.of_all(), *parts.PARTS[name])


def _block(family: str, component: str, region: str, target: str = L4) -> Callable[[], Case]:
    return lambda: _one(_blocks(family, component), component, region, target)


@cache
def _blocks(family: str, component: str) -> Recording:
    from tests.end_to_end.test_families import spec_of

    with tempfile.TemporaryDirectory() as folder:
        spec: dict[str, Any] = spec_of(family, Path(folder))
        spec["source"]["dtype"] = "bfloat16"
        spec["passes"] = [{"name": "compile", "component": component}]
        return parts.rewritten(spec | {"target": {"device": "cuda", "gpu": L4}})


def _quantized(kind: str) -> Callable[[], Case]:
    def make() -> Case:
        return _one(parts.quantized_recording(kind), "transformer", "FluxTransformerBlock", H200)

    return make


def _ranged(component: str) -> Callable[[], Case]:
    def make() -> Case:
        recording = parts.ranges()
        found = families(list(recording.modules[component].regions.values()))
        shared = next(family for family in found if family.ranges)
        ends = (shared.members[0], shared.members[-1])
        return Case(shared.members[0], ends, recording.constants.tensors, L4, shared)

    return make


def _by_hand() -> Case:
    region = regions.bfloat16_block()
    constants = {key: torch.linspace(0.5, 1.5, 16, dtype=torch.bfloat16).reshape(16, 1) for key in region.constants}
    return Case(region, (region,), constants, L4)


def _convolution(cudnns: bool) -> Callable[[], Case]:
    def make() -> Case:
        # As many channels as come out: Inductor leaves the layout of fewer alone.
        region = regions.in_type(regions.convolution(16), "bfloat16")
        return Case(region, (region,), {}, L4, cudnns=cudnns)

    return make


#: The case that mistakes are made in.
MISTAKEN = "by-hand"
#: The case that the runtime must refuse.
MISLAID = "mislaid-convolution"
SAMPLE: Mapping[str, Callable[[], Case]] = {
    MISTAKEN: _by_hand,
    "flux-double": _block("flux", "transformer", "FluxTransformerBlock", H200),
    "flux-single": _block("flux", "transformer", "FluxSingleTransformerBlock"),
    "sdxl-unet": _block("sdxl", "unet", "BasicTransformerBlock"),
    "wan-block": _block("wan", "transformer", "WanTransformerBlock"),
    "clip": _part("CLIP"),
    "t5": _part("T5"),
    "vae-decoder": _part("VAE decoder"),
    "before-blocks": _part("before the blocks"),
    "scheduler": _part("scheduler"),
    "int8-weights": _quantized("int8_weight_only"),
    "float8-weights": _quantized("float8_weight_only"),
    "sizes": _ranged("transformer"),
    MISLAID: _convolution(cudnns=False),
    "convolution": _convolution(cudnns=True),
}
CASES: Mapping[str, Callable[[], Case]] = SAMPLE | {
    "after-blocks": _part("after the blocks"),
    "int8-dynamic": _quantized("int8_dynamic"),
    "int4-weights": _quantized("int4_weight_only"),
    "float8-dynamic": _quantized("float8_dynamic"),
    "sizes-scheduler": _ranged("scheduler"),
}
