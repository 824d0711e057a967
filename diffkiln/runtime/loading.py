"""From a directory to a pipeline: integrity, compatibility, trust, engines, self-test. In this order.

Weights are hashed as they are read, in threads, while programs are read. They are done before native code is loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from diffkiln.bundle import (
    Manifest,
    Policy,
    Progress,
    Role,
    Verified,
    find_policy,
    open_bundle,
    require_signer,
)
from diffkiln.bundle.layout import SCHEMAS, TEXT
from diffkiln.errors import Incompatible
from diffkiln.guards import forks
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, active, applied
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.aten import check_schemas
from diffkiln.program import Mesh, Module
from diffkiln.program.planner import MAX_MEMORY
from diffkiln.runtime.arrival import Arrival
from diffkiln.runtime.attention import check_kernels, kernels_of
from diffkiln.runtime.checking import check_budget, check_stored
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.current_device import current
from diffkiln.runtime.engines import holds_weights
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.graphs import check_addresses, graphs_for
from diffkiln.runtime.memory import decided, limit_of, offload_policy
from diffkiln.runtime.opening import open_engines, read_constants, read_json, read_modules, read_text, read_variant
from diffkiln.runtime.parts import Part, part_of
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.processes import (
    Group,
    check_mesh,
    check_started,
    is_one_of_several,
    local_rank,
    mesh_of,
)
from diffkiln.runtime.targets import check_device, device_for, fitting_targets
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant

log = get_logger(__name__)

_ROLES: frozenset[Role] = frozenset(get_args(Role))


@gated("progress")
def load(
    path: str | os.PathLike[str],
    *,
    allow_native: bool = False,
    as_diffusers: bool = False,
    device: str | torch.device | None = None,
    check_engines: bool | None = None,
    policy: Policy | str | os.PathLike[str] | None = None,
    rehash: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
    paranoid: bool = False,
    max_memory: str | int | None = None,
    share_weights: bool = False,
) -> Any:
    """Loads a bundle. Compiles nothing, and imports neither diffusers nor transformers.

    Args:
        path: the bundle's directory, or hf://owner/name@commit, which is fetched from the Hub once (extra `hub`).
        allow_native: load native code that this user did not build on this machine.
        as_diffusers: return the original diffusers pipeline, with the engines plugged in.
        device: the device to run on; by default the bundle's target.
        check_engines: True compares every engine with the replay of its region, False none. By default, engines that
            were not compared on this machine are compared; on a CPU only the smallest of each kind, and no large ones.
        policy: the policy with the trusted signers; by default the user's own policy file, if there is one.
        rehash: hash all weights again, even those unchanged since the last load.
        progress: called with the number of bytes hashed since its last call.
        limits: the memory, time and text that the bundle may use; `diffkiln.Limits()` has the defaults.
        paranoid: compare the type of every result with the declared type, at each call. This costs some microseconds
            an operation.
        max_memory: the most memory that a call may take on the device for weights, constants and results, and on a CPU
            for the process's working memory; as bytes or such as "8GiB". Weights that do not fit beside the others are
            brought in as they are needed. By default what the bundle says.
        share_weights: keep one copy of the weights in memory for all processes of this user that ask for it, on a CPU
            and where the bundle keeps its weights resident. It lies in the cache directory, in files that nobody else
            can write to, and takes as much disk. Elsewhere this changes nothing.

    Raises:
        SpecError: `max_memory` is no amount of memory.
        PolicyInvalid: the policy is malformed.
        IntegrityError: the bundle is incomplete, lacks a signature that the policy requires, or has native code that
            is not allowed.
        Incompatible: the bundle is for another machine, torch or format, or a call needs more than `max_memory`; or it
            runs in several processes, and not as many were started.
        HubError: the Hub does not have the bundle, or refuses it.
    """
    options = LoadOptions(allow_native, check_engines, progress, paranoid, limit_of(max_memory), share_weights)
    if as_diffusers and options.max_memory is not None:
        raise Incompatible(
            "max_memory: as_diffusers runs diffusers' own code, which keeps no limit. Leave one of them out"
        )
    with applied(limits):
        return _loaded(path, as_diffusers, device, policy, rehash, options)


@dataclass(frozen=True)
class LoadOptions:
    """The options of a load, as `load` describes them; `max_memory` is in bytes.

    `group` are the processes that run each call together, for a bundle that has several.
    """

    allow_native: bool = False
    check_engines: bool | None = None
    progress: Progress | None = None
    paranoid: bool = False
    max_memory: int | None = None
    share_weights: bool = False
    group: Group | None = None


def _loaded(
    path: str | os.PathLike[str],
    as_diffusers: bool,
    device: str | torch.device | None,
    policy: Policy | str | os.PathLike[str] | None,
    rehash: bool,
    options: LoadOptions,
) -> Any:
    if isinstance(path, str) and path.startswith("hf://"):
        from diffkiln.hub import cached

        path = cached(path, lambda manifest: fitting_targets(manifest, device))
    forks.keep_openmp(functools.partial(torch.set_num_threads, 1))
    trusted = find_policy(policy)
    with open_bundle(path) as bundle:
        # Weights are hashed as they are read, beside the rest of the load, unless diffusers reads them.
        roles = None if as_diffusers else _ROLES - {"weights"}
        verified = bundle.verify(options.progress, roles, receipt="renew" if rehash else "use")
    try:
        if trusted is not None and trusted.require_signature:
            require_signer(verified, trusted)
        mesh = mesh_of(verified.manifest) if not as_diffusers or is_one_of_several() else None
        device = device_for(verified.manifest, device if mesh is None else _own_device(mesh, verified.manifest, device))
        check_device(verified.manifest, device)
        with current(device):
            if not as_diffusers:
                options = options if mesh is None else replace(options, group=_joined(mesh, device))
                return load_verified(verified, trusted, device, options)
            from diffkiln.runtime.diffusers.loading import load_as_diffusers

            if verified.manifest.runtime.get("cuda_graphs"):
                log.warning("no CUDA graphs: they are of the bundle's program, which as_diffusers does not run")
            return load_as_diffusers(
                verified,
                allow_native=options.allow_native,
                policy=trusted,
                device=device,
                check_engines=options.check_engines,
            )
    except BaseException:
        verified.close()
        raise


def _joined(mesh: Mesh, device: torch.device) -> Group:
    from diffkiln.runtime.processes.distributed import Distributed

    return Distributed(mesh, device)


def _own_device(mesh: Mesh, manifest: Manifest, device: str | torch.device | None) -> str | torch.device | None:
    """Returns the device of this process of several: of GPUs that are not numbered, its own.

    Raises:
        Incompatible: another number of processes was started.
    """
    check_started(mesh)
    wanted = str(device or manifest.runtime.get("device", "cpu"))
    return f"cuda:{local_rank()}" if wanted == "cuda" else device


def _programs(verified: Verified) -> tuple[Mapping[str, Module], Sequence[CompiledVariant]]:
    """Returns all of a bundle's programs, verified."""
    modules = read_modules(verified)
    count = len(verified.manifest.pipeline.variants)
    return modules, [read_variant(verified, index, modules) for index in range(count)]


def _part_of(verified: Verified, group: Group | None) -> Part | None:
    """Returns what this process of several needs; None for one that runs alone."""
    if group is None:
        return None
    return part_of(verified, *_programs(verified), group.mesh, group.rank)


def load_verified(verified: Verified, policy: Policy | None, device: Any, options: LoadOptions) -> CompiledPipeline:
    """Loads a bundle that has been opened; the arguments are those of `load`."""
    manifest, limits = verified.manifest, active()
    limits.check("variants", len(manifest.pipeline.variants), "the manifest")
    if manifest.runtime.get("only_diffusers"):
        raise Incompatible(
            f"this bundle of {manifest.pipeline.class_name} runs only as diffusers, by load(..., as_diffusers=True): "
            f"{manifest.runtime['only_diffusers']}"
        )
    check_manifest(manifest)
    chosen = device_for(manifest, device)
    graphs = graphs_for(manifest, chosen)
    offload = offload_policy(manifest, chosen, options.max_memory)
    part = _part_of(verified, options.group)
    groups = part.groups if part is not None else manifest.weights
    with Arrival(verified, chosen, offload, options.progress, options.share_weights, groups) as arrival:
        modules, variants = (part.modules, part.variants) if part is not None else _programs(verified)
        check_kernels(kernels_of(modules), chosen)
        check_schemas(read_json(verified, SCHEMAS))
        constants = read_constants(verified)
        calls = [program for variant in variants for program in variant.programs.values()]
        check_budget(modules, calls, limits, chosen)
        every = [program for module in modules.values() for program in module.programs.values()]
        check_mesh(mesh_of(manifest), [*calls, *every])
    absent = part.absent if part is not None else ()
    # By now every file has been hashed, so native code may be loaded.
    engines = open_engines(
        verified, modules, constants, chosen, options.allow_native, policy, options.check_engines, absent
    )
    tf32: Any = manifest.runtime.get("tf32")
    kept = decided(verified, modules, offload, variants, groups, chosen)
    check_addresses(graphs, kept.policy)
    store = arrival.store(kept.policy, kept.arena)
    inside = {key for key, engine in engines.items() if holds_weights(engine)}
    check_stored(modules, calls, store.type_of, constants, inside)
    executor = Executor(
        modules,
        store,
        constants,
        engines,
        chosen,
        tf32,
        graphs,
        limits.seconds,
        options.paranoid,
        kept.residency,
        options.group,
        frugal=chosen.type == "cpu" and offload is not None and MAX_MEMORY in offload,
    )
    tokenizers = {
        Path(row.path).stem: read_text(verified, row.path)
        for row in manifest.files
        if row.path.startswith(TEXT) and row.role == "config"
    }
    text = TextEnd(tokenizers, [program for variant in variants for program in variant.programs.values()])
    return CompiledPipeline(manifest.pipeline.class_name, variants, executor, text, verified)
