"""What `compile` has to know of each backend, from configuration and recording alone.

The exporters, which do the work, are another part; a backend's name is all that the two share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch

from diffkiln.errors import Problem
from diffkiln.interpreter.cuda import cuda_problems
from diffkiln.passes.base import State
from diffkiln.program import Module, Program, onnx, tensorrt
from diffkiln.spec import Target


@dataclass(frozen=True)
class Asked:
    """A component that is to be compiled, as a spec asks for it.

    Attributes:
        component: its name.
        module: its ghost; None for the scheduler's arithmetic.
        plan: what the passes before made of the pipeline.
        target: one that is built for.
        where: the JSON path of the pass.
        fullgraph: whether graph breaks are forbidden.
    """

    component: str
    module: torch.nn.Module | None
    plan: State
    target: Target
    where: str
    fullgraph: bool

    @property
    def facts(self) -> set[str]:
        """What passes established of the component, by name."""
        return {fact.name for fact in self.plan.facts if fact.component == self.component}


class Backend:
    """One backend.

    Attributes:
        name: as the spec has it.
        whole: whether a region is the whole component where the spec does not say.
        flagless: why the backend has none of Inductor's flags; empty where it has them.
        unbroken: why a region cannot have graph breaks; empty where it can.
        computes: a type that it takes, for whoever must cast.
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False
    flagless: ClassVar[str] = ""
    unbroken: ClassVar[str] = "an engine that is built ahead of time has no graph breaks"
    computes: ClassVar[str] = "float32"

    def packages(self) -> dict[str, str]:
        """What the bundle needs where it runs."""
        return {}

    def problems(self, asked: Asked) -> Iterator[Problem]:
        """What stands in the way, from configuration."""
        if "attention_by_package" in asked.facts:
            reason = "an engine holds torch's operators alone, and a package computes the attention"
            yield Problem(
                asked.where,
                f"compile cannot follow attention_backend: {reason}",
                "Choose a native kernel, or torch_compile with graph breaks.",
            )

    def type_problems(
        self, component: str, module: Module, target: Target, whole: bool, where: str
    ) -> Iterator[Problem]:
        """Types that the backend cannot compute in, from the recording."""
        programs = (*(module.programs.values() if whole else ()), *module.regions.values())
        for reason in dict.fromkeys(reason for program in programs for reason in self._refused(program, target)):
            yield Problem(
                f"{where}.backend", f"{self.name} cannot compute {component}: {reason}", self._cast(component)
            )

    def _refused(self, program: Program, target: Target) -> Iterator[str]:
        """Why types of one program cannot be computed in."""
        return iter(())

    def _cast(self, component: str) -> str:
        return f'Put {{"name": "cast", "component": "{component}", "dtype": "{self.computes}"}} before it.'


def _own_attention(runner: str, asked: Asked) -> Iterator[Problem]:
    if "attention_chosen" in asked.facts:
        reason = f"{runner} computes attention in its own way, whatever kernel attention_backend chose"
        yield Problem(asked.where, reason, "Remove one of the two, or choose aot_inductor.")


def _missing(where: str, *names: str) -> Iterator[Problem]:
    if missing := [name for name in names if find_spec(name) is None]:
        reason = f"{', '.join(missing)}: not installed, and needed to export to ONNX and to try the engines"
        yield Problem(f"{where}.backend", reason, "pip install 'diffkiln[onnx]'")


class AotInductor(Backend):
    name = "aot_inductor"

    def problems(self, asked: Asked) -> Iterator[Problem]:
        yield from super().problems(asked)
        for problem in cuda_problems() if asked.target.device == "cuda" else ():
            reason = f"to build for {asked.target.name}, {problem.where}: {problem.reason}"
            yield Problem(f"{asked.where}.backend", reason, problem.mend)


class Onnx(Backend):
    name = "onnx"
    whole = True
    flagless = "ONNX Runtime has none of them"

    def packages(self) -> dict[str, str]:
        return {onnx.PACKAGE: onnx.VERSIONS}

    def problems(self, asked: Asked) -> Iterator[Problem]:
        yield from _missing(asked.where, *onnx.EXPORTING, onnx.PACKAGE)
        yield from _own_attention("ONNX Runtime", asked)

    def _refused(self, program: Program, target: Target) -> Iterator[str]:
        return onnx.type_problems(program)


class Tensorrt(Backend):
    name = "tensorrt"
    whole = True
    flagless = "TensorRT has none of them"
    computes = "float16"

    def problems(self, asked: Asked) -> Iterator[Problem]:
        """What library and target say, and the types of the weights."""
        yield from _own_attention("TensorRT", asked)
        target, where = asked.target, f"{asked.where}.backend"
        if target.device != "cuda":
            reason = f"TensorRT builds for NVIDIA's GPUs, the target is {target.name}"
            yield Problem(where, reason, "Choose a GPU as the target, or another backend.")
            return
        if target.capability < tensorrt.OLDEST:
            least = ".".join(map(str, tensorrt.OLDEST))
            reason = f"found compute capability {target.compute_capability} ({target.name}), required {least} or later"
            yield Problem(where, f"TensorRT: {reason}", "Choose another backend.")
            return
        yield from _missing(asked.where, *onnx.EXPORTING)
        library = tensorrt.library_for(target.capability)
        if find_spec(library.module) is None:
            yield Problem(where, *_library_missing(library, target))
        kinds = {str(p.dtype).removeprefix("torch.") for p in asked.module.parameters()} if asked.module else set()
        for reason in filter(None, (tensorrt.type_problem(kind, target.capability) for kind in sorted(kinds))):
            told = f"tensorrt cannot compute {asked.component}: {reason} (its weights)"
            yield Problem(where, told, self._cast(asked.component))

    def _refused(self, program: Program, target: Target) -> Iterator[str]:
        return tensorrt.type_problems(program, target.capability)


def _library_missing(library: tensorrt.Library, target: Target) -> tuple[str, str]:
    """Why and what to do where the library that builds for a target is not installed."""
    reason = f"{target.name} ({target.sm}): found no package {library.package}, required to build for it"
    if library is tensorrt.RTX:
        return reason, library.install
    able = ", ".join(f"{major}.{minor}" for major, minor in sorted(tensorrt.RTX.portable))
    return f"{reason}, since {tensorrt.RTX.package} builds for {able} alone", (
        f"{library.install}, on a machine with that GPU, which {library.title} times its kernels on; or choose another "
        "target or backend."
    )


class TorchCompile(Backend):
    name = "torch_compile"
    unbroken = ""

    def problems(self, asked: Asked) -> Iterator[Problem]:
        if asked.fullgraph and "attention_by_package" in asked.facts:
            reason = "the graph of a block breaks where a package computes the attention"
            yield Problem(f"{asked.where}.fullgraph", reason, 'Set "fullgraph" to false, or choose a native kernel.')


BACKENDS: Mapping[str, Backend] = {each.name: each() for each in (AotInductor, Onnx, Tensorrt, TorchCompile)}
