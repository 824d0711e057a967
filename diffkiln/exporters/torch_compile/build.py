"""Have a region compiled by `torch.compile` where it runs, and keep what Inductor wrote when it was compiled here.

    Program ──torch.compile──▶ region.json, options.json, caches/…

It is the way for what cannot be lowered ahead of time: a region with attention by a package's kernels, whose graph
breaks there. What a bundle's runtime then needs is what `torch.compile` needs: a C++ compiler, or Triton on a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffkiln.bundle.layout import acted_on
from diffkiln.errors import ExportError
from diffkiln.exporters import toolchain
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.torch_compile.check import TorchCompile
from diffkiln.interpreter.aten import dtype_of
from diffkiln.interpreter.fx import CACHES, OPTIONS, REGION, compiled
from diffkiln.program import ATTENTION, Op, Program, dumps, program_to_json


def tools(lowering: Lowering) -> dict[str, str]:
    """Returns what decides whether Inductor's caches fit. Python's path is part of how Inductor calls its compiler."""
    return {
        "torch": torch.__version__,
        "python": sys.version,
        "prefix": sys.prefix,
        "compiler": toolchain.find_compiler().version,
    }


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    if lowering.family:
        raise ExportError("torch_compile compiles for one size at a time")
    region, options = lowering.region, dict(lowering.options)
    fullgraph = options.pop("fullgraph", True)
    target = lowering.target
    isa = target.isa if target.device == "cpu" else ""
    settings = {"device": target.device, "isa": isa, "flags": options, "fullgraph": fullgraph}
    engine = folder / "engine"
    engine.mkdir()
    (engine / REGION).write_bytes(dumps(program_to_json(region)))
    (engine / OPTIONS).write_text(json.dumps(settings, sort_keys=True) + "\n")
    device = torch.device(target.device)
    special = {ATTENTION: _stand_in(region, device)}
    compiled(region, engine / CACHES, device=device, isa=isa, flags=options, fullgraph=fullgraph, special=special)
    _tidy(engine / CACHES)
    outputs = tuple(contiguous(region.types[ref.name]) for ref in region.outputs)
    return Artefact(TorchCompile.name, engine, input_specs(region), outputs, dict(lowering.options))


def _stand_in(region: Program, device: torch.device) -> Callable[[Op], Callable[..., Sequence[torch.Tensor]]]:
    """Returns zeros of the right type for a package's results: compiling the code around it needs no more."""

    def special(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        types = [region.types[name] for name in op.outputs]
        return lambda *_: [torch.zeros(t.shape, dtype=dtype_of(t.dtype), device=device) for t in types]

    return special


def _tidy(caches: Path) -> None:
    """Removes what a later process does not need: locks, and sources, which the entries hold as well."""
    shutil.rmtree(caches / "locks", ignore_errors=True)
    for file in caches.rglob("*"):
        if acted_on(file.name) and file.is_file():
            file.unlink()
