"""From a directory to a pipeline: integrity, compatibility, trust, engines, self-test. In this order.

Weights are hashed as they are read, in threads, while programs are read. They are done before native code is loaded.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, get_args

import torch

from diffkiln.bundle import (
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
from diffkiln.runtime.arrival import Arrival
from diffkiln.runtime.attention import check_kernels, kernels_of
from diffkiln.runtime.checking import check_budget, check_stored
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.engines import holds_weights
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.graphs import graphs_for
from diffkiln.runtime.opening import open_engines, read_constants, read_json, read_modules, read_text, read_variant
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.places import current
from diffkiln.runtime.targets import check_device, fitting_targets, place_for
from diffkiln.runtime.text import TextEnd

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
) -> Any:
    """Load a bundle. Nothing is compiled, and neither diffusers nor transformers is imported.

    Args:
        path: the bundle's directory, or hf://owner/name@commit, which is fetched from the Hub once (extra `hub`).
        allow_native: load native code though this user did not build the bundle here.
        as_diffusers: give the original diffusers pipeline, with the engines plugged in, instead.
        device: where to run; the bundle's target by default.
        check_engines: compare every engine with the replay of its region before it serves, or none. By default those
            that were not compared here before; on a CPU the smallest of each kind, and no large ones.
        policy: whose signatures count; the user's own policy file by default, where there is one.
        rehash: hash weights again that were hashed at an earlier load and look untouched.
        progress: called with the number of bytes hashed since its last call.
        limits: what the bundle may take; `diffkiln.guards.limits.Limits()` has the defaults.
        paranoid: compare the type of every result with the declared one, at each call. Slower by some microseconds an
            operation.

    Raises:
        PolicyInvalid: the policy is not one.
        IntegrityError: the bundle is not whole, or not signed as the policy requires, or its native code is refused.
        Incompatible: the bundle is for another machine, torch or format.
        HubError: the Hub does not give what the address names.
    """
    with applied(limits):
        return _loaded(path, allow_native, as_diffusers, device, check_engines, policy, rehash, progress, paranoid)


def _loaded(
    path: str | os.PathLike[str],
    allow_native: bool,
    as_diffusers: bool,
    device: str | torch.device | None,
    check_engines: bool | None,
    policy: Policy | str | os.PathLike[str] | None,
    rehash: bool,
    progress: Progress | None,
    paranoid: bool,
) -> Any:
    if isinstance(path, str) and path.startswith("hf://"):
        from diffkiln.hub import cached

        path = cached(path, lambda manifest: fitting_targets(manifest, device))
    forks.keep_openmp(functools.partial(torch.set_num_threads, 1))
    trusted = find_policy(policy)
    with open_bundle(path) as bundle:
        # Weights are hashed as they are read, beside the rest of the load, unless diffusers reads them.
        roles = None if as_diffusers else _ROLES - {"weights"}
        verified = bundle.verify(progress, roles, receipt="renew" if rehash else "use")
    try:
        if trusted is not None and trusted.require_signature:
            require_signer(verified, trusted)
        device = place_for(verified.manifest, device)
        check_device(verified.manifest, device)
        with current(device):
            if not as_diffusers:
                return _load(verified, allow_native, trusted, device, check_engines, progress, paranoid)
            from diffkiln.runtime.diffusers.loading import load_as_diffusers

            if verified.manifest.runtime.get("cuda_graphs"):
                log.warning("no CUDA graphs: they are of the bundle's program, which as_diffusers does not run")
            return load_as_diffusers(
                verified, allow_native=allow_native, policy=trusted, device=device, check_engines=check_engines
            )
    except BaseException:
        verified.close()
        raise


def _load(
    verified: Verified,
    allow_native: bool,
    policy: Policy | None,
    device: Any,
    check_engines: bool | None,
    progress: Progress | None,
    paranoid: bool,
) -> CompiledPipeline:
    manifest, limits = verified.manifest, active()
    limits.check("variants", len(manifest.pipeline.variants), "the manifest")
    if manifest.runtime.get("only_diffusers"):
        raise Incompatible(
            f"this bundle of {manifest.pipeline.class_name} runs only as diffusers, by load(..., as_diffusers=True): "
            f"{manifest.runtime['only_diffusers']}"
        )
    check_manifest(manifest)
    place = place_for(manifest, device)
    graphs = graphs_for(manifest, place)
    offload: Any = manifest.runtime.get("offload")
    with Arrival(verified, place, offload, progress) as arrival:
        modules = read_modules(verified)
        check_kernels(kernels_of(modules), place)
        check_schemas(read_json(verified, SCHEMAS))
        constants = read_constants(verified)
        variants = [read_variant(verified, index, modules) for index in range(len(manifest.pipeline.variants))]
        calls = [program for variant in variants for program in variant.programs.values()]
        check_budget(modules, calls, limits, place)
    # By now every file has been hashed, so native code may be loaded.
    engines = open_engines(verified, modules, constants, place, allow_native, policy, check_engines)
    tf32: Any = manifest.runtime.get("tf32")
    store = arrival.store()
    inside = {key for key, engine in engines.items() if holds_weights(engine)}
    check_stored(modules, calls, store.type_of, constants, inside)
    executor = Executor(modules, store, constants, engines, place, tf32, graphs, limits.seconds, paranoid)
    tokenizers = {
        Path(row.path).stem: read_text(verified, row.path)
        for row in manifest.files
        if row.path.startswith(TEXT) and row.role == "config"
    }
    text = TextEnd(tokenizers, [program for variant in variants for program in variant.programs.values()])
    return CompiledPipeline(manifest.pipeline.class_name, variants, executor, text, verified)
