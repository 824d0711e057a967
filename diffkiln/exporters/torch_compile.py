"""Have a region compiled by `torch.compile` where it runs, and keep what Inductor wrote when it was compiled here.

    Program ──torch.compile──▶ region.json, options.json, caches/…

It is the way for what cannot be lowered ahead of time: a region with attention by a package's kernels, whose graph
breaks there. What a bundle's runtime then needs is what `torch.compile` needs: a C++ compiler, or Triton on a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffkiln.bundle.layout import acted_on
from diffkiln.errors import ExportError, Problem
from diffkiln.exporters import toolchain
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, engine_inputs, export_once, foreign, unknown_options
from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.aten import dtype_of
from diffkiln.interpreter.fx import CACHES, OPTIONS, REGION, compiled
from diffkiln.interpreter.inductor import FLAGS
from diffkiln.program import ATTENTION, Op, Program, dumps, program_to_json
from diffkiln.spec.targets import Target


class TorchCompile:
    """The backend `torch_compile`. Its options are Inductor's flags, and `fullgraph`: whether breaks are refused."""

    name: ClassVar[str] = "torch_compile"
    version: ClassVar[int] = 1

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> Sequence[Problem]:
        problems = unknown_options(options, (*FLAGS, "fullgraph"))
        if reason := _not_here(target):
            mend = f"Build on a machine that is {target.name}, or choose aot_inductor."
            problems.append(Problem("$.target", f"torch_compile compiles where it runs, and {reason}", mend))
        breaks = foreign(region)
        if breaks and options.get("fullgraph", True):
            mend = 'Set "fullgraph" to false, or choose one of torch\'s own kernels.'
            problems.append(Problem("$.fullgraph", f"the graph breaks at {', '.join(breaks)}", mend))
        return problems

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        return export_once(self, lowering, cache, _tools, lambda scratch: self._build(lowering, scratch))

    def _build(self, lowering: Lowering, scratch: Path) -> Artefact:
        if lowering.family:
            raise ExportError("torch_compile compiles for one size at a time")
        region, options = lowering.region, dict(lowering.options)
        fullgraph = options.pop("fullgraph", True)
        target = lowering.target
        isa = target.isa if target.device == "cpu" else ""
        told = {"device": target.device, "isa": isa, "flags": options, "fullgraph": fullgraph}
        folder = scratch / "engine"
        folder.mkdir()
        (folder / REGION).write_bytes(dumps(program_to_json(region)))
        (folder / OPTIONS).write_text(json.dumps(told, sort_keys=True) + "\n")
        device = torch.device(target.device)
        compiled(
            region,
            folder / CACHES,
            device=device,
            isa=isa,
            flags=options,
            fullgraph=fullgraph,
            special={ATTENTION: _stand_in(region, device)},
        )
        _tidy(folder / CACHES)
        inputs = tuple(contiguous(type_) for type_ in engine_inputs(region))
        outputs = tuple(contiguous(region.types[ref.name]) for ref in region.outputs)
        return Artefact(self.name, folder, inputs, outputs, dict(lowering.options))


def _not_here(target: Target) -> str:
    """Why this machine cannot run code for the target; empty where it can."""
    if target.device == "cpu":
        checks = {"x86-64-v3": torch.cpu._is_avx2_supported, "x86-64-v4": torch.cpu._is_avx512_supported}
        able = target.isa == "x86-64-v2" or (target.isa in checks and checks[target.isa]())
        return "" if able else f"this machine cannot run {target.isa}"
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    found = torch.cuda.get_device_capability()
    return "" if found == target.capability else f"this machine's GPU is of SM {found[0]}.{found[1]}"


def _tools() -> dict[str, str]:
    """What decides whether Inductor's caches fit: where Python lies is part of how it calls its compiler."""
    return {
        "torch": torch.__version__,
        "python": sys.version,
        "prefix": sys.prefix,
        "compiler": toolchain.find_compiler().version,
    }


def _stand_in(region: Program, device: torch.device) -> Callable[[Op], Callable[..., Sequence[torch.Tensor]]]:
    """Zeros of the right type for what a package computes: compiling what lies around it needs no more."""

    def special(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        types = [region.types[name] for name in op.outputs]
        return lambda *_: [torch.zeros(t.shape, dtype=dtype_of(t.dtype), device=device) for t in types]

    return special


def _tidy(caches: Path) -> None:
    """Leave out what a later process has no use for: locks, and sources, which the entries hold as well."""
    shutil.rmtree(caches / "locks", ignore_errors=True)
    for file in caches.rglob("*"):
        if acted_on(file.name) and file.is_file():
            file.unlink()
