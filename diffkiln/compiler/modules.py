"""One module, compiled without a pipeline: recorded as a component is, lowered, and called as the module is."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.compiler.packing.engines import device_for
from diffkiln.compiler.verify import compare_component
from diffkiln.errors import BuildError, CallError, Incompatible, RecordError, SpecError
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import exporter, input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.interpreter.aten import Interpreter, type_of
from diffkiln.models.meta import emptied, make_fake
from diffkiln.models.weights import weights_of
from diffkiln.passes.outlining import between_blocks, whole
from diffkiln.program import REGION, Module, Op, Program, weight_in
from diffkiln.record.components import Callee, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.structure import flatten, key_of, unflatten
from diffkiln.runtime.compatibility import capability, missing_flags
from diffkiln.runtime.engine_blocks import weight_getter
from diffkiln.runtime.engines import Engine, engine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec import DEFAULT_BACKEND, TARGETS, Target, find_gpu, suggest

_SCOPES: Mapping[str, Callable[[Module], Module]] = {
    "blocks": lambda module: module,
    "between": between_blocks,
    "whole": whole,
}


@gated()
def compile_module(
    module: torch.nn.Module,
    example_kwargs: Mapping[str, Any],
    *,
    target: str | Target = "cpu-x86-64-v3",
    backend: str = DEFAULT_BACKEND,
    scope: str = "blocks",
    fixed: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    cache: EngineCache | None = None,
) -> CompiledModule:
    """Compiles one module for arguments of the types and shapes of an example.

    Args:
        module: a module on the CPU. It keeps its weights, which may change without compiling again.
        example_kwargs: keywords of its `forward`. The tensors' values do not matter; all other values are fixed.
        target: a name that `diffkiln targets` lists.
        backend: the name of a backend.
        scope: "blocks" compiles each repeated block, "between" also the operations between them, "whole" everything.
        fixed: keywords whose tensors have the example's values at every call: masks, positions, lengths. They are
            folded, so a module may choose its shapes or its control flow by them.
        options: options of the backend.
        cache: the cache of engines; by default the user's.

    Raises:
        SpecError: an unknown target or scope, or a fixed keyword that the example lacks.
        RecordError: the module cannot be recorded, with the line of its code.
        VerifyError: the recorded program or an engine gives other results than the module.
        ExportError: the backend cannot lower a region.
        Incompatible: the target is a CPU of a higher level than this machine's.

    Engines for a GPU that is not in this machine are built and not tried: the result can be saved, not called. To call
    engines for the GPU that is here, move the module and the arguments to it.
    """
    machine = _machine(target)
    if scope not in _SCOPES:
        raise SpecError(f"scope: {scope!r} is not one of {', '.join(_SCOPES)}")
    if unknown := sorted(set(fixed) - example_kwargs.keys()):
        raise SpecError(f"fixed: the example has no {unknown[0]!r}. {suggest(unknown[0], example_kwargs)}".rstrip())
    constants = Constants()
    callee, recorded = record_module(module, example_kwargs, fixed, constants)
    recorded = _SCOPES[scope](recorded)
    device, weights = device_for(machine), dict(weights_of(module))
    engines: dict[str, Engine] = {}
    artefacts: dict[str, Artefact] = {}
    for region in recorded.regions.values():
        own = {key: constants.tensors[key] for key in region.constants}
        named = {name: weights[name] for name in region.weights if name in weights}
        lowering = Lowering(region, machine, own, dict(options or {}), weights=named)
        artefacts[region.name] = artefact = exporter(backend).export(lowering, cache or EngineCache())
        engines[region.name] = _Elsewhere(machine)
        if device is not None:
            engines[region.name] = engine(backend)(artefact.directory, input_specs(region), device)
            self_test(engines[region.name], region, own, device, f"the engine of {region.name}")
    folded = {key: tensor.to(device) if device and tensor.ndim else tensor for key, tensor in constants.tensors.items()}
    return CompiledModule(module, callee, recorded, engines, folded, artefacts, machine)


class CompiledModule:
    """A module's `forward` by engines, and operation by operation between them. Called as the module is.

    Attributes:
        module: the original, whose weights are looked up at each call.
        program: what runs; `regions` are the pieces of it that have engines.
        artefacts: the engine of each region, on disk.
        target: the machine that they are for.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        callee: Callee,
        recorded: Module,
        engines: Mapping[str, Engine],
        constants: Mapping[str, torch.Tensor],
        artefacts: Mapping[str, Artefact],
        target: Target,
    ) -> None:
        self.module, self.regions = module, recorded.regions
        self.artefacts, self.target = artefacts, target
        self.program: Program = recorded.programs[callee.program]
        self._callee, self._engines, self._constants = callee, engines, constants
        self._expected = key_of(callee.leaves, callee.structure)
        self._weights = {name: weight_getter(module, name) for name in dict(recorded.weight_types())}
        self._interpreter = Interpreter(self.program, special={REGION: self._region})
        self._now: Mapping[str, torch.Tensor] = {}

    @gated()
    def __call__(self, **kwargs: Any) -> Any:
        """Returns the module's result for these keywords.

        Raises:
            CallError: a tensor has another type or shape, or another argument another value, than the example's.
            Incompatible: this machine has not the GPU that the engines are for.
        """
        leaves, structure = flatten(((), kwargs))
        if key_of(leaves, structure) != self._expected:
            raise CallError(_difference(kwargs, unflatten(self._callee.leaves, self._callee.structure)[1]))
        for position, constant in self._callee.folded.items():
            if not torch.equal(leaves[position], constant):
                name = _keyword_at(position, kwargs)
                raise CallError(f"{name}: other values than the example's, which the module was compiled for")
        inputs = [leaves[position] for position in self._callee.tensors if position not in self._callee.folded]
        with torch.inference_mode():
            self._now = {name: get() for name, get in self._weights.items()}
            found = iter(self._interpreter(inputs, self._now, self._constants))
        result, shape = self._callee.result
        return unflatten([next(found) if isinstance(leaf, torch.Tensor) else leaf for leaf in result], shape)

    @gated()
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the engine of each region into a new directory: `<Region>/…`, as its backend lays it out.

        Raises:
            BuildError: the directory is there already, or cannot be written.
        """
        root = Path(directory)
        try:
            root.mkdir(parents=True)
            for name, artefact in self.artefacts.items():
                shutil.copytree(artefact.directory, root / name)
        except OSError as error:
            raise BuildError(f"{root}: the engines cannot be saved: {error}") from error

    def _region(self, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        region, run = self.regions[op.attrs["region"]], self._engines[op.attrs["region"]]
        names = [weight_in(op, weight) for weight in region.weights]
        folded = [self._constants[key] for key in region.constants]
        return lambda *args: run([*args, *(self._now[name] for name in names), *folded])


def record_module(
    module: torch.nn.Module, kwargs: Mapping[str, Any], fixed: Collection[str], constants: Constants
) -> tuple[Callee, Module]:
    """Records the module's program, and compares it bit for bit with the module on the example.

    `constants` takes the folded tensors.
    """
    leaves, structure = flatten(((), dict(kwargs)))
    try:
        with torch.inference_mode():
            result = flatten(module(**kwargs))
    except Exception as error:  # whatever a module raises
        what = f"{type(module).__name__} cannot be called with the example"
        raise RecordError(f"{what}: {type(error).__name__}: {error}") from error
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    meta = copy.deepcopy(module, dict(tensors))
    make_fake(emptied(meta), fake)
    types = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    folded = {
        position: leaf.clone()
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and _keyword_at(position, kwargs) in fixed
    }
    callee = Callee("module", "forward", meta, meta.forward, types, structure, result, folded=folded)
    recorded = record_component([callee], fake, constants)
    compare_component(callee, module, recorded, leaves, constants.tensors)
    return callee, recorded


def _keyword_at(position: int, kwargs: Mapping[str, Any]) -> str:
    """Returns the keyword that the leaf at this position belongs to."""
    owners = [name for name, value in kwargs.items() for _ in flatten(value)[0]]
    return owners[position]


def _machine(target: str | Target) -> Target:
    found = target if isinstance(target, Target) else TARGETS.get(target) or find_gpu(target)
    if found is None:
        raise SpecError(f"target: there is no {target!r}. {suggest(str(target), TARGETS)}".rstrip())
    if found.device == "cpu" and (missing := missing_flags(found.isa)):
        raise Incompatible(f"{found.name}: this machine lacks {', '.join(sorted(missing))}. Choose a lower level")
    return found


class _Elsewhere:
    """The placeholder of an engine for a GPU that is not here."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        found = capability()
        here = f"sm_{found[0]}{found[1]}" if found else f"none that torch {torch.__version__} can use"
        raise Incompatible(
            f"gpu: found {here}, required {self._target.sm} ({self._target.name}), which the module was compiled for. "
            "Compile it on such a machine, which takes the engines from the cache if it is there, or for this one"
        )

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        self([])


def _difference(given: Mapping[str, Any], example: Mapping[str, Any]) -> str:
    """Returns the first keyword that differs."""

    def word(value: Any) -> str:
        return str(type_of(value)) if isinstance(value, torch.Tensor) else repr(value)[:80]

    for name in sorted(given.keys() | example.keys()):
        if (name in given) != (name in example):
            return f"{name}: {'given, and the example has none' if name in given else 'missing, the example has it'}"
        found, required = flatten(given[name]), flatten(example[name])
        if key_of(*found) != key_of(*required):
            return (
                f"{name}: {word(given[name])} found, {word(example[name])} required, which the module was compiled for"
            )
    return "the arguments are nested in another way than the example's"


__all__ = ["CompiledModule", "compile_module", "record_module"]
