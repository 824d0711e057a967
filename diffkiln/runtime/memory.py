"""The memory that the calls of a bundle take, and which of its weights stay in memory to keep within a limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffkiln.bundle import GroupEntry, Manifest, Verified, device_of, open_bundle
from diffkiln.bundle.evidence import working_memory_of
from diffkiln.bundle.layout import CONSTANTS
from diffkiln.errors import Incompatible, IntegrityError, SpecError
from diffkiln.guards.amounts import bytes_of
from diffkiln.guards.gate import gated
from diffkiln.program import REGION, Module, Program, weight_in
from diffkiln.program.mesh import LAYERS
from diffkiln.program.moments import Groups, Key
from diffkiln.program.planner import AUTO, MAX_MEMORY, STRATEGY, STREAM, PlannedCall, Planner
from diffkiln.program.residency import Residency, TooSmall
from diffkiln.program.streaming import Arena
from diffkiln.program.working import WorkingMemory, working_memory
from diffkiln.runtime.accelerator import accelerator
from diffkiln.runtime.checking import total_memory
from diffkiln.runtime.groups import keys_by_weight, read_groups
from diffkiln.runtime.opening import read_modules, read_variant
from diffkiln.runtime.parts import part_of
from diffkiln.runtime.processes import mesh_of
from diffkiln.runtime.variants import CompiledVariant


@gated()
def plan_memory(
    path: str | os.PathLike[str], *, max_memory: str | int | None = None
) -> dict[str, dict[str, PlannedCall]]:
    """Plans the memory of a bundle's calls. No weight is read, and no engine is loaded.

    Args:
        path: the bundle's directory.
        max_memory: the most memory that a call may take for weights, constants and results, and on a CPU for the
            process's working memory; as bytes or such as "8GiB". By default what the bundle says.

    Returns:
        The plan of each variant's programs, by the variant's name and the program's. Sizes are in bytes.

    Raises:
        SpecError: `max_memory` is no amount of memory.
        Incompatible: a call needs more than `max_memory`; says how much.
        IntegrityError: the bundle is incomplete, or was changed.
    """
    most = limit_of(max_memory)
    with open_bundle(path) as bundle, bundle.verify(roles={"program", "config"}) as verified:
        modules = read_modules(verified)
        count = len(verified.manifest.pipeline.variants)
        variants = [read_variant(verified, index, modules) for index in range(count)]
        policy, mesh = _policy(verified.manifest, most), mesh_of(verified.manifest)
        device = torch.device(str(verified.manifest.runtime.get("device", "cpu")))
        found: dict[str, dict[str, PlannedCall]] = {variant.name: {} for variant in variants}
        # Of processes that run a range of layers each, the plan of the one that takes the most.
        for rank in range(mesh.count(LAYERS) if mesh is not None else 1):
            part = part_of(verified, modules, variants, mesh, rank)
            planner = planner_of(verified, part.modules, policy, part.variants, part.groups, device)
            for variant in part.variants:
                for name, program in variant.programs.items():
                    plan, known = _planned(planner, variant, program), found[variant.name].get(name)
                    if known is None or plan.residency.peak > known.residency.peak:
                        found[variant.name][name] = plan
        return found


def limit_of(max_memory: str | int | None) -> int | None:
    """Returns a caller's limit in bytes. Raises `SpecError` for what is no amount of memory."""
    try:
        return None if max_memory is None else bytes_of(max_memory)
    except ValueError as error:
        raise SpecError(f"max_memory: {error}") from None


def offload_policy(manifest: Manifest, device: torch.device, max_memory: int | None) -> dict[str, Any] | None:
    """Returns how weights are offloaded on a device: the bundle's policy, or that of the caller's limit in bytes."""
    policy = _policy(manifest, max_memory)
    if policy is not None and policy.get(STRATEGY) == AUTO and policy.get(MAX_MEMORY) is None:
        there = accelerator(device)
        return policy | {MAX_MEMORY: there.memory().free if there else total_memory(device)}
    return policy


def _policy(manifest: Manifest, max_memory: int | None) -> dict[str, Any] | None:
    offload: Any = manifest.runtime.get("offload")
    if max_memory is None:
        return offload
    streams = offload is not None and offload.get(STRATEGY) == STREAM
    return {**(offload or {}), STRATEGY: STREAM if streams else AUTO, MAX_MEMORY: max_memory}


def planner_of(
    verified: Verified,
    modules: Mapping[str, Module],
    policy: Mapping[str, Any] | None,
    variants: Sequence[CompiledVariant],
    groups: Mapping[str, Sequence[GroupEntry]],
    device: torch.device,
) -> Planner:
    """Returns the planner of a bundle's calls; the arguments are those of `decided`."""
    stored = read_groups(verified, groups)
    keys = keys_by_weight(stored)

    def key_of(component: str, weight: str) -> Key:
        try:
            return keys[component, weight]
        except KeyError:
            raise IntegrityError(f"the bundle holds no weight {weight!r} of component {component!r}") from None

    inside = {(name, region) for name, module in modules.items() for region in _inside(name, module, keys)}
    streams = policy is not None and policy.get(STRATEGY) == STREAM
    sizes = {key: group.layout.nbytes if streams else group.nbytes for key, group in stored.items()}
    constants = sum(row.size for row in verified.manifest.files if row.path == CONSTANTS)
    working = working_on(device, verified)
    return Planner(Groups(modules, key_of, inside), sizes, policy, constants, inside, _calls(variants), working)


def working_on(device: torch.device, verified: Verified) -> WorkingMemory | None:
    """Returns the working memory of a process that runs a bundle on a device; None where it is not planned."""
    if device.type != "cpu":
        return None
    manifest = verified.manifest
    rows = working_memory_of(verified.build)
    targets: Any = manifest.runtime.get("targets", {})
    own = {name: row for name, row in rows.items() if name in targets and device_of(manifest, name) == "cpu"}
    weights = sum(group.bytes for groups in manifest.weights.values() for group in groups)
    return working_memory(weights, own, torch.get_num_threads())


def _calls(variants: Sequence[CompiledVariant]) -> list[Program]:
    return [program for variant in variants for program in variant.programs.values()]


def _inside(component: str, module: Module, keys: Mapping[tuple[str, str], Key]) -> set[str]:
    """Returns the regions whose engines hold the weights themselves, as no file has them."""
    calls = [op for program in module.programs.values() for op in program.ops if op.name == REGION]
    return {
        op.attrs["region"]
        for op in calls
        for name in module.regions[op.attrs["region"]].weights
        if (component, weight_in(op, name)) not in keys
    }


class Decision(NamedTuple):
    """How a bundle's weights are kept.

    Attributes:
        policy: by which they are offloaded; None keeps all of them in memory.
        residency: the plan of each call, where there is a limit.
        arena: the slots of weights that stream.
    """

    policy: dict[str, Any] | None
    residency: Callable[[Program], Residency] | None = None
    arena: Arena | None = None


def decided(
    verified: Verified,
    modules: Mapping[str, Module],
    policy: dict[str, Any] | None,
    variants: Sequence[CompiledVariant],
    groups: Mapping[str, Sequence[GroupEntry]],
    device: torch.device,
) -> Decision:
    """Returns how weights are kept. Where all calls fit into `auto`'s limit, they are not offloaded.

    Args:
        verified: the bundle.
        modules, variants: what this process runs.
        policy: how weights are offloaded.
        groups: the weights that this process needs, as the manifest lists them.
        device: where they are used.

    Raises:
        Incompatible: a call needs more than the policy's limit.
    """
    strategy = policy.get(STRATEGY) if policy is not None else None
    if strategy not in (AUTO, STREAM):
        return Decision(policy)
    planner = planner_of(verified, modules, policy, variants, groups, device)
    plans = [_planned(planner, variant, program) for variant in variants for program in variant.programs.values()]
    if strategy == STREAM:
        return Decision(policy, arena=planner.arena)
    if all(plan.residency.strategy == "resident" for plan in plans):
        return Decision(None)
    return Decision(policy, planner.residency)


def _planned(planner: Planner, variant: CompiledVariant, program: Program) -> PlannedCall:
    try:
        return planner(program)
    except TooSmall as error:
        besides = f", beside {planner.working}" if planner.working else ""
        raise Incompatible(
            f"max_memory: {error}, for variant {variant.name!r}. Most of it is needed {error.where}{besides}. Give "
            "that much, or compile smaller inputs, tiles of the VAE, or quantized weights"
        ) from None
