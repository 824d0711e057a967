"""What a backend of `compile` is, and what an exporter gets and gives.

An exporter lowers one region for one target into an *engine*: a directory of files that a backend in
`diffkiln.runtime.engines` loads. Weights and constants are the engine's inputs, so one engine serves every block with
the same region, and none of them is needed to build it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import torch

from diffkiln import plugins
from diffkiln.bundle.manifest import TensorSpec
from diffkiln.bundle.scratch import scratch
from diffkiln.errors import ExportError, Problem
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache, engine_key
from diffkiln.exporters.options import Options
from diffkiln.interpreter.aten import dtype_name
from diffkiln.program import ATTENTION, Module, Program, TensorType, engine_types
from diffkiln.spec import Runtime, suggest
from diffkiln.spec.targets import Target


class Exporter:
    """A backend: what fits it, said once, and which options it has. Nothing here builds anything.

    Class attributes:
        name: as specs and bundles have it.
        version: changes whenever the same lowering would give other files; it is part of the cache's key.
        builder: the name of its `build` module, which is imported when an engine is to be built. `tools(lowering)`
            gives the programs that build, with the versions that decide the bytes; `build(lowering, folder, cache)`
            writes the engine into an empty folder, from several threads at once. Both raise `MissingDependency` for a
            package that is not installed, `build` also `ExportError`: why, and what to do.
        summary: one sentence on what it makes.
        examples: entries of a spec.
        options: the model of its options.
        whole: whether a region is the whole component where the spec does not say.
        computes: a type that it takes, for whoever must cast.
        packages: what the bundle needs where it runs, with version specifiers.
        complete: whether its engines are compiled when the bundle is made, and not when it is loaded.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    builder: ClassVar[str]
    summary: ClassVar[str] = ""
    examples: ClassVar[tuple[dict[str, Any], ...]] = ()
    options: ClassVar[type[Options]] = Options
    whole: ClassVar[bool] = False
    computes: ClassVar[str] = "float32"
    packages: ClassVar[Mapping[str, str]] = {}
    complete: ClassVar[bool] = True

    def target_problems(self, target: Target) -> Iterator[Problem]:
        """Yields why there can be no engine for a target, wherever it is built."""
        yield from ()

    def machine_problems(self, target: Target) -> Iterator[Problem]:
        """Yields what this machine lacks to build for a target; `where` is what is lacking, if it has a name."""
        yield from ()

    def promise_problems(self, target: Target, where: str) -> Iterator[Problem]:
        """Yields what a target promises to make do with, and the engines would not; `where` is its JSON path."""
        yield from ()

    def runtime_problems(self, options: Options, runtime: Runtime, where: str) -> Iterator[Problem]:
        """Yields what a spec asks of the runtime, and engines with these options cannot do; `where` is the pass's."""
        yield from ()

    def refused_facts(self, options: Options) -> Mapping[str, Problem]:
        """Returns the facts that passes establish of a component and that it cannot follow; `where` is the field."""
        reason = "an engine holds torch's operators alone, and a package computes the attention"
        hint = "Choose a native kernel, or torch_compile with graph breaks."
        return {"attention_by_package": Problem("", f"compile cannot follow attention_backend: {reason}", hint)}

    def refused_type(self, dtype: str, target: Target) -> str | None:
        """Returns why weights of a type cannot be taken; None where they can, or where the recording will tell."""
        return None

    def refused_types(self, program: Program, target: Target) -> Iterator[str]:
        """Yields why types of a program cannot be computed in."""
        yield from ()

    def holds_weights(self, options: Mapping[str, Any]) -> bool:
        """Returns True if engines with these lowered options hold their weights, and so need them to be built."""
        return False

    def may_break(self, options: Mapping[str, Any]) -> bool:
        """Returns True if a graph may break where an operation is not torch's."""
        return False

    def problems(
        self,
        component: str,
        module: torch.nn.Module | None,
        facts: Collection[str],
        target: Target,
        where: str,
        options: Options,
    ) -> Iterator[Problem]:
        """Yields what stands in the way of compiling a component, from configuration alone.

        Args:
            component: its name.
            module: without weights; None for the scheduler's arithmetic.
            facts: what passes established of it.
            target: one that is built for.
            where: the JSON path of the pass.
            options: this backend's own.
        """
        yield from options.problems(component, module, target, where)
        for fact, refusal in self.refused_facts(options).items():
            if fact in facts:
                yield replace(refusal, where=where + refusal.where)
        impossible = list(self.target_problems(target))
        for problem in impossible or self.machine_problems(target):
            what = f"to build for {target.name}, {problem.where}: " if problem.where else ""
            yield Problem(f"{where}.backend", what + problem.reason, problem.hint)
        for dtype in sorted({dtype_name(tensor.dtype) for tensor in module.parameters()} if module else ()):
            if not impossible and (reason := self.refused_type(dtype, target)):
                yield self._type_problem(component, f"{reason} (its weights)", where)

    def type_problems(
        self, component: str, module: Module, target: Target, whole: bool, where: str
    ) -> Iterator[Problem]:
        """Yields types that the backend cannot compute in, from the recording of a component."""
        programs = (*(module.programs.values() if whole else ()), *module.regions.values())
        reasons = [reason for program in programs for reason in self.refused_types(program, target)]
        for reason in dict.fromkeys(reasons):
            yield self._type_problem(component, reason, where)

    def _type_problem(self, component: str, reason: str, where: str) -> Problem:
        hint = f'Put {{"name": "cast", "component": "{component}", "dtype": "{self.computes}"}} before it.'
        return Problem(f"{where}.backend", f"{self.name} cannot compute {component}: {reason}", hint)

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> list[Problem]:
        """Returns what stands in the way of lowering a region with these lowered options. Nothing is compiled."""
        hint = f"Cast the component to {self.computes} before it is compiled, or choose another backend."
        problems = [*unknown_options(options, self.options.lowers), *self.target_problems(target)]
        problems += [Problem("", reason, hint) for reason in self.refused_types(region, target)]
        return problems + foreign_operators(region)

    def export(self, lowering: Lowering, cache: EngineCache) -> Artefact:
        """Returns the engine of a lowering: from the cache, or built in an empty folder and put there.

        Raises:
            ExportError: names the region, the reason and the hint.
        """
        refused = f"the region {lowering.region.name!r} cannot be lowered by {self.name}:"
        if problems := self.check(lowering.region, lowering.target, lowering.options):
            raise ExportError("\n".join([refused, *map(str, problems)]), problems=problems)
        builder = import_module(self.builder)
        key = engine_key(self.name, self.version, lowering, builder.tools(lowering))
        if (found := cache.get(key)) is not None:
            return found
        try:
            with scratch("export") as folder:
                return cache.put(key, builder.build(lowering, folder, cache))
        except ExportError as error:
            raise ExportError(f"{refused} {error}") from error


def exporter(name: str) -> Exporter:
    """Returns the exporter of this name.

    Raises:
        ExportError: no package that is installed brings it.
        MissingDependency: it needs a package that is not installed.
    """
    known = plugins.plugins("exporters")
    if name not in known:
        hint = suggest(name, known) or f"There are {', '.join(known)}"
        raise ExportError(f"there is no backend {name!r}. {hint}")
    return plugins.load("exporters", name)


def engine_inputs(region: Program) -> tuple[TensorType, ...]:
    """Returns the types of an engine's inputs in their order."""
    return tuple(engine_types(region).values())


def input_specs(region: Program) -> tuple[TensorSpec, ...]:
    """Returns the layouts of an engine's inputs in their order: all contiguous."""
    return tuple(map(contiguous, engine_inputs(region)))


def contiguous(type_: TensorType) -> TensorSpec:
    """Returns the layout of a contiguous tensor of this type."""
    stride = tuple(math.prod(max(size, 1) for size in type_.shape[i + 1 :]) for i in range(len(type_.shape)))
    return TensorSpec(dtype=type_.dtype, shape=type_.shape, stride=stride)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Returns the layout of a tensor, which may be fake."""
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), stride=tuple(tensor.stride())
    )


def foreign(region: Program) -> list[str]:
    """Returns what of a region is not an ATen operator, each once: "attention by sage"."""
    ops = [op for op in region.ops if not op.is_aten]
    return sorted({f"{op.name} by {op.attrs['kernel']}" if op.name == ATTENTION else op.name for op in ops})


def foreign_operators(region: Program) -> list[Problem]:
    """Returns a problem if a region holds anything but ATen operators."""
    found = foreign(region)
    reason = f"the region {region.name!r} is not operators alone: {', '.join(found)}"
    return [Problem("", reason)] if found else []


def unknown_options(options: Mapping[str, Any], known: Sequence[str]) -> list[Problem]:
    """Returns a problem for each option that the backend does not have."""
    hint = f"It takes {', '.join(sorted(known))}." if known else "It takes none."
    return [Problem(f"$.{name}", "the backend has no such option", hint) for name in options if name not in known]
