"""What `compile` has to know of each backend, from configuration and recording alone.

The exporters, which do the work, are another part; a backend's name is all that the two share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import ClassVar

from diffkiln.cuda import cuda_problems
from diffkiln.errors import Problem
from diffkiln.passes.base import Fact, Plan
from diffkiln.program import Module, onnx
from diffkiln.spec import Target


class Backend:
    """One backend.

    Attributes:
        name: as the spec has it.
        whole: whether a region is the whole component where the spec does not say.
        flagless: why the backend has none of Inductor's flags; empty where it has them.
        unbroken: why a region cannot have graph breaks; empty where it can.
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False
    flagless: ClassVar[str] = ""
    unbroken: ClassVar[str] = "an engine that is built ahead of time has no graph breaks"

    def packages(self) -> dict[str, str]:
        """What the bundle needs where it runs."""
        return {}

    def problems(self, component: str, plan: Plan, target: Target, where: str, fullgraph: bool) -> Iterator[Problem]:
        """What stands in the way, from configuration."""
        if Fact("attention_by_package", component) in plan.facts:
            reason = "an engine holds torch's operators alone, and a package computes the attention"
            yield Problem(where, reason, "Choose a native kernel, or torch_compile with graph breaks.")

    def type_problems(self, component: str, module: Module, whole: bool, where: str) -> Iterator[Problem]:
        """Types that the backend cannot compute in, from the recording."""
        return iter(())


class AotInductor(Backend):
    name = "aot_inductor"

    def problems(self, component: str, plan: Plan, target: Target, where: str, fullgraph: bool) -> Iterator[Problem]:
        yield from super().problems(component, plan, target, where, fullgraph)
        for problem in cuda_problems() if target.device == "cuda" else ():
            reason = f"to build for {target.name}, {problem.where}: {problem.reason}"
            yield Problem(f"{where}.backend", reason, problem.mend)


class Onnx(Backend):
    name = "onnx"
    whole = True
    flagless = "ONNX Runtime has none of them"

    def packages(self) -> dict[str, str]:
        return {onnx.PACKAGE: onnx.VERSIONS}

    def problems(self, component: str, plan: Plan, target: Target, where: str, fullgraph: bool) -> Iterator[Problem]:
        missing = [name for name in (*onnx.EXPORTING, onnx.PACKAGE) if find_spec(name) is None]
        if missing:
            reason = f"{', '.join(missing)}: not installed, and needed to export to ONNX and to try the engines"
            yield Problem(f"{where}.backend", reason, "pip install 'diffkiln[onnx]'")
        if Fact("attention_chosen", component) in plan.facts:
            reason = "ONNX Runtime computes attention in its own way, whatever kernel attention_backend chose"
            yield Problem(where, reason, "Remove one of the two, or choose aot_inductor.")

    def type_problems(self, component: str, module: Module, whole: bool, where: str) -> Iterator[Problem]:
        programs = (*(module.programs.values() if whole else ()), *module.regions.values())
        for reason in dict.fromkeys(reason for program in programs for reason in onnx.type_problems(program)):
            mend = f'Put {{"name": "cast", "component": "{component}", "dtype": "float32"}} before it.'
            yield Problem(f"{where}.backend", f"onnx cannot compute {component}: {reason}", mend)


class TorchCompile(Backend):
    name = "torch_compile"
    unbroken = ""

    def problems(self, component: str, plan: Plan, target: Target, where: str, fullgraph: bool) -> Iterator[Problem]:
        if fullgraph and Fact("attention_by_package", component) in plan.facts:
            reason = "the graph of a block breaks where a package computes the attention"
            yield Problem(f"{where}.fullgraph", reason, 'Set "fullgraph" to false, or choose a native kernel.')


BACKENDS: Mapping[str, Backend] = {each.name: each() for each in (AotInductor, Onnx, TorchCompile)}
