"""What is known of a bundle's programs before anything runs: that their types hold, and what a call will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from diffkiln.errors import ManifestInvalid
from diffkiln.guards.limits import Limits
from diffkiln.interpreter.aten import type_of
from diffkiln.program import CALL, REGION, Module, Op, Program, TensorType, owner_of, refs
from diffkiln.program.inference import infer_types
from diffkiln.program.memory import peak_memory
from diffkiln.program.verify import verify_call_types, verify_types
from diffkiln.runtime.accelerator import accelerator, available

#: The file in which a control group says how much memory its processes may have.
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_module(module: Module) -> None:
    """Infers the types of a component's programs and regions.

    Raises:
        VerifyError: a value is declared with another type than its operation gives.
    """
    for region in module.regions.values():
        infer_types(region)
    for program in module.programs.values():
        verify_types(program, module.regions)
        infer_types(program)


def check_call(program: Program, modules: Mapping[str, Module]) -> None:
    """Infers the types of a call, whose components are checked.

    Raises:
        VerifyError: as `check_module`.
    """
    verify_call_types(program, modules)
    infer_types(program)


def check_narrowed(programs: Mapping[str, Program]) -> None:
    """Checks that calls in the place of others take and give the same: a caller's inputs are made for the others.

    Raises:
        ManifestInvalid: one does not, or there is no such other.
    """
    for name, program in programs.items():
        if program.slots is None:
            continue
        other = programs.get(program.instead_of)
        if other is None or other.slots is not None or _interface(other) != _interface(program):
            instead = program.instead_of[:60]
            raise ManifestInvalid(f"program {name!r} runs in the place of {instead!r}, which takes or gives another")


def _interface(call: Program) -> tuple[object, ...]:
    """Returns what a call takes and gives; results by their types, whatever their names."""
    results = list(call.result_types("").values())
    signature = {key: value for key, value in call.signature.items() if not any(refs(value))}
    return call.inputs, call.texts, results, signature


def without(absent: Collection[str], modules: Mapping[str, Module], calls: Sequence[Program]) -> dict[str, Module]:
    """Returns the components that a process holds, some of which are absent.

    Raises:
        ManifestInvalid: a call runs one of these.
    """
    for call in calls:
        for op in call.ops:
            if op.name == CALL and op.attrs["component"] in absent:
                raise ManifestInvalid(
                    f"program {call.name!r} runs {op.attrs['component']} in every process, and the manifest says that "
                    "the first one alone does"
                )
    return {name: module for name, module in modules.items() if name not in absent}


def check_stored(
    modules: Mapping[str, Module],
    calls: Sequence[Program],
    stored: Callable[[str, str], TensorType | None],
    constants: Mapping[str, torch.Tensor],
    inside: Collection[tuple[str, str]] = (),
) -> None:
    """Compares the types of weights and constants in the files with those that the programs declare.

    Args:
        modules: components by name.
        calls: every call program.
        stored: returns the type of a component's weight, None if no file holds it.
        constants: folded tensors by key.
        inside: (component, region) of engines that hold their weights themselves.

    Raises:
        ManifestInvalid: names the first weight or constant that is missing or of another type.
    """
    programs = [*calls]
    for name, module in modules.items():
        programs += [*module.programs.values(), *module.regions.values()]
        own = {region for component, region in inside if component == name}
        for weight, declared in module.weight_types(own):
            _compare(f"the weight {weight!r} of component {name!r}", stored(name, weight), declared)
    for call in calls:
        for weight in call.weights:
            component, rest = owner_of(weight)
            _compare(f"the weight {weight!r} of the call", stored(component, rest), call.types[f"@{weight}"])
    for program in programs:
        for key in program.constants:
            found = type_of(constants[key]) if key in constants else None
            _compare(f"the constant {key!r} of {program.name!r}", found, program.types[f"#{key}"])


def _compare(what: str, found: TensorType | None, declared: TensorType) -> None:
    if found is None:
        raise ManifestInvalid(f"{what}: a program reads it, and no file holds it")
    if found != declared:
        raise ManifestInvalid(f"{what}: the file holds {found}, the program declares {declared}")


def check_budget(modules: Mapping[str, Module], calls: Sequence[Program], limits: Limits, device: torch.device) -> None:
    """Compares what the programs will take with what the user allows.

    Raises:
        LimitExceeded: too many operations, in the bundle or in one call, or more memory for results than is allowed.
    """
    programs = {name: _module_costs(module) for name, module in modules.items()}
    every = [*calls, *(p for m in modules.values() for p in (*m.programs.values(), *m.regions.values()))]
    limits.check("operations", sum(len(program.ops) for program in every), "the bundle's programs")

    def called(op: Op) -> tuple[int, int]:
        return programs[op.attrs["component"]][op.attrs["program"]] if op.name == CALL else (0, 0)

    found = limits.memory_bytes if limits.memory_bytes is not None else total_memory(device)
    within = limits.replaced(memory_bytes=found)
    for count, peak in _costs({str(index): call for index, call in enumerate(calls)}, called).values():
        limits.check("operations_per_call", count, "one call of the bundle")
        within.check("memory_bytes", peak, "the results of one call of the bundle")


def _module_costs(module: Module) -> dict[str, tuple[int, int]]:
    regions = _costs(module.regions, lambda _: (0, 0))
    return _costs(module.programs, lambda op: regions[op.attrs["region"]] if op.name == REGION else (0, 0))


def _costs(programs: Mapping[str, Program], inside: Callable[[Op], tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Returns how many operations each program runs, and the bytes of its results at their peak."""
    found = {}
    for name, program in programs.items():
        count = sum(1 + inside(op)[0] for op in program.ops)
        found[name] = count, peak_memory(program, lambda op: inside(op)[1]).nbytes
    return found


def total_memory(device: torch.device) -> int | None:
    """Returns the bytes of memory that a device has, or that a control group leaves to this process.

    None for a GPU that is not there, which another check refuses.
    """
    if device.type != "cpu":
        there = accelerator(device) if available() else None
        return there.memory().total if there else None
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:")) * 1024
    limit = _GROUP_LIMIT.read_text().strip() if _GROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total
