"""From a directory to a pipeline: integrity, compatibility, trust, engines, self-test. In this order.

Weights are hashed as they are read, in threads, while programs are read. They are done before native code is loaded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from diffkiln import forks
from diffkiln.aten import check_schemas, dtype_of
from diffkiln.bundle import (
    EngineRow,
    Policy,
    Progress,
    Role,
    Verified,
    authorise_native,
    find_policy,
    open_bundle,
    require_signer,
)
from diffkiln.errors import DiffkilnError, Incompatible, ManifestInvalid
from diffkiln.gate import gated
from diffkiln.limits import Limits, active, applied
from diffkiln.printable import get_logger
from diffkiln.program import Module, Program, module_from_json, program_from_json, verify, verify_module
from diffkiln.runtime.accelerator import accelerator
from diffkiln.runtime.arrival import Arrival
from diffkiln.runtime.attention import check_kernels, kernels_of
from diffkiln.runtime.checking import check_budget, check_call, check_module, check_stored
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.engines import engine as engine_class
from diffkiln.runtime.engines import holds_weights
from diffkiln.runtime.executor import Engine, Executor
from diffkiln.runtime.graphs import graphs_for
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.places import current
from diffkiln.runtime.self_test import self_test
from diffkiln.runtime.targets import check_device, choose_target, fitting_targets, place_for
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.trials import Trials
from diffkiln.runtime.variants import CompiledVariant
from diffkiln.runtime.weights import read_table

log = get_logger(__name__)

_ROLES: frozenset[Role] = frozenset(get_args(Role))

CONSTANTS, SCHEMAS = "programs/constants.safetensors", "programs/operators.json"
#: In a component's folder of `pipeline/`: its layers that are stored in another form.
LAYERS = "layers.json"


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
        limits: what the bundle may take; `diffkiln.limits.Limits()` has the defaults.
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
            from diffkiln.runtime.as_diffusers import load_as_diffusers

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
        if row.path.startswith("text/") and row.role == "config"
    }
    text = TextEnd(tokenizers, [program for variant in variants for program in variant.programs.values()])
    return CompiledPipeline(manifest.pipeline.class_name, variants, executor, text, verified)


def read_json(verified: Verified, path: str) -> Any:
    """A JSON file of the bundle.

    Raises:
        ManifestInvalid: it is not JSON.
    """
    try:
        return json.loads(verified.read(path))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"{path!r} is not valid JSON: {error}") from None


def read_text(verified: Verified, path: str) -> str:
    """Returns the content of a text file of the bundle. Raises `ManifestInvalid` if it is not UTF-8."""
    active().check("json_bytes", verified.size(path), path)
    try:
        return verified.read(path).decode()
    except UnicodeDecodeError as error:
        raise ManifestInvalid(f"{path!r} is not UTF-8 at byte {error.start}") from None


def read_modules(verified: Verified) -> dict[str, Module]:
    """Every component's programs, verified."""
    modules = {}
    calls = {path for variant in verified.manifest.pipeline.variants for path in variant.programs.values()}
    for row in verified.manifest.files:
        if row.role != "program" or not row.path.endswith(".json") or row.path in calls or row.path == SCHEMAS:
            continue
        module = module_from_json(read_json(verified, row.path))
        component = Path(row.path).stem
        every = (*module.programs.values(), *module.regions.values())
        active().check("operations", sum(len(program.ops) for program in every), repr(row.path))
        verify_module(module)
        check_module(module)
        modules[component] = module
    return modules


def read_variant(verified: Verified, index: int, modules: Mapping[str, Module]) -> CompiledVariant:
    """One variant with its call programs, verified."""
    variant = verified.manifest.pipeline.variants[index]
    programs: dict[str, Program] = {}
    for name, path in variant.programs.items():
        try:
            data = read_json(verified, path)["programs"][name]
        except (KeyError, TypeError, IndexError):
            raise ManifestInvalid(f"{path!r} holds no program {name!r}, which variant {variant.name!r} names") from None
        programs[name] = program_from_json(data)
        active().check("operations", len(programs[name].ops), repr(path))
        verify(programs[name], modules=modules)
        check_call(programs[name], modules)
    return CompiledVariant(variant.name, variant.fixed, programs)


def read_constants(verified: Verified) -> dict[str, torch.Tensor]:
    """The folded tensors by key, on the CPU, from the bytes that were hashed."""
    import safetensors

    if not any(row.path == CONSTANTS for row in verified.manifest.files):
        return {}
    data = verified.read(CONSTANTS)
    read_table(CONSTANTS, len(data), lambda size, offset: data[offset : offset + size])  # which knows limits
    try:
        rows = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ManifestInvalid(f"{CONSTANTS!r} is broken: {error}") from None
    constants = {}
    for key, row in rows:
        if row["dtype"] not in _SAFETENSORS:
            raise ManifestInvalid(f"{CONSTANTS!r}: {key!r} is of the type {row['dtype']}, which no constant has")
        dtype = dtype_of(_SAFETENSORS[row["dtype"]])
        flat = (
            torch.frombuffer(bytearray(row["data"]), dtype=torch.uint8)
            if row["data"]
            else torch.empty(0, dtype=torch.uint8)
        )
        # A byte that is neither 0 nor 1 is no boolean: compilers take it for one or the other, as it suits them.
        values = flat != 0 if dtype == torch.bool else flat.view(dtype)
        constants[key] = values.reshape(row["shape"]).clone()
    return constants


_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip


def open_engines(
    verified: Verified,
    modules: Mapping[str, Module],
    constants: Mapping[str, torch.Tensor],
    place: torch.device,
    allow_native: bool,
    policy: Policy | None,
    check_engines: bool | None,
) -> dict[tuple[str, str], Engine]:
    """The engines of the target that fits; none where the bundle allows to replay on a machine that it is not for."""
    manifest = verified.manifest
    if not manifest.engines:
        return {}
    try:
        target = choose_target(manifest, place, verified.targets)
        rows = [row for row in manifest.engines if row.target == target]
        trials = Trials(verified, rows, modules, place, check_engines)
        permit = authorise_native(verified, allow_native, policy)
        opened: dict[str, Engine] = {}  # by path: one engine may be for several regions
        found = {}
        for row in rows:
            region = _region_of(row, modules)
            if row.path not in opened:
                opened[row.path] = _open(permit.verified, row, region, constants, place, trials)
            found[row.component, row.region] = opened[row.path]
        if check_engines is not False and (there := accelerator(place)):
            there.release()  # what the comparisons took, which the weights need now
        return found
    except Incompatible as error:
        if manifest.runtime.get("on_incompatible") != "eager":
            raise
        log.warning("running without engines, as the bundle allows: %s", error)
        return {}


def _open(
    verified: Verified,
    row: EngineRow,
    region: Program,
    constants: Mapping[str, torch.Tensor],
    place: torch.device,
    trials: Trials,
) -> Engine:
    what = f"engine {row.path}"
    engine = engine_class(row.backend)(verified.native_copy(row.path), row.inputs, place)
    if trials.wants(row.path):
        try:
            self_test(engine, region, constants, place, what)
        except DiffkilnError:
            raise
        except RuntimeError as error:
            raise Incompatible(f"{what} does not run here: {error}") from error
        trials.passed(row.path)
    return engine


def _region_of(row: EngineRow, modules: Mapping[str, Module]) -> Program:
    """The region that an engine is for.

    Raises:
        ManifestInvalid: the bundle does not have it, or it takes other inputs.
    """
    what = f"engine {row.path}"
    region = modules[row.component].regions.get(row.region) if row.component in modules else None
    if region is None:
        raise ManifestInvalid(f"{what} is for {row.component}/{row.region}, which the bundle does not have")
    kinds = [item.type for item in region.inputs]
    kinds += [region.types[f"@{name}"] for name in region.weights]
    kinds += [region.types[f"#{key}"] for key in region.constants]
    if [(item.dtype, tuple(item.shape)) for item in row.inputs] != [(kind.dtype, kind.shape) for kind in kinds]:
        raise ManifestInvalid(f"{what} takes other inputs than its region")
    return region
