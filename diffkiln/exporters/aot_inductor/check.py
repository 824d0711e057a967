"""What AOTInductor takes: operators of torch, for every CPU, and for a GPU that need not be in this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from diffkiln.errors import Problem
from diffkiln.exporters.aot_inductor.absent_gpu import torch_problem
from diffkiln.exporters.base import Exporter
from diffkiln.exporters.cuda import broken_promises, cuda_problems, gpu_is_here
from diffkiln.exporters.flags import Inductors
from diffkiln.interpreter.inductor import ISAS
from diffkiln.program import Program
from diffkiln.spec.targets import Target


class AotInductor(Exporter):
    """The backend `aot_inductor`."""

    name: ClassVar[str] = "aot_inductor"
    builder = "diffkiln.exporters.aot_inductor.build"
    summary = "writes native code for a CPU or a GPU, which need not be in this machine."
    options = Inductors
    examples: ClassVar = (
        {"name": "compile", "component": "transformer", "backend": name, "scope": "blocks"},
        {"name": "compile", "component": "vae", "scope": "whole", "flags": {"conv_1x1_as_mm": True}},
        {"name": "compile", "component": "scheduler"},
    )

    def machine_problems(self, target: Target) -> Iterator[Problem]:
        if target.device == "cuda":
            yield from cuda_problems()

    def promise_problems(self, target: Target, where: str) -> Iterator[Problem]:
        yield from broken_promises(target, where)

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> list[Problem]:
        return [*super().check(region, target, options), *_isa_problems(target), *self._gpu_problems(target)]

    def _gpu_problems(self, target: Target) -> list[Problem]:
        """Returns what stops this machine from building for the target's GPU."""
        if target.device != "cuda":
            return []
        problems = [*self.machine_problems(target), *self.promise_problems(target, "$.target")]
        if not problems and not gpu_is_here(target) and (reason := torch_problem()):
            problems.append(Problem("torch", reason, "Install one of these, or build on a machine that has the GPU."))
        return problems


def _isa_problems(target: Target) -> list[Problem]:
    """Returns what stops this machine from building for the target's CPU."""
    if target.isa not in ISAS:
        return [Problem("$.target.isa", f"no {target.isa!r} here", f"Choose one of {', '.join(ISAS)}.")]
    if target.device == "cpu" and target.isa == "x86-64-v4" and not torch.cpu._is_avx512_supported():
        reason = "engines for x86-64-v4 are tried when they are built, and this machine has no AVX-512"
        return [Problem("$.target.isa", reason, "Build on a machine that has it, or for x86-64-v3.")]
    return []
