"""What a load reads of a bundle: programs, constants and engines, each checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import EngineEntry, Policy, Verified, authorise_native
from diffkiln.bundle.layout import CONSTANTS, SCHEMAS
from diffkiln.errors import DiffkilnError, Incompatible, ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.aten import dtype_of
from diffkiln.program import Module, Program, module_from_json, program_from_json, verify, verify_module
from diffkiln.runtime.accelerator import accelerator
from diffkiln.runtime.checking import check_call, check_module, check_narrowed
from diffkiln.runtime.engines import engine as engine_class
from diffkiln.runtime.executor import Engine
from diffkiln.runtime.self_test import self_test
from diffkiln.runtime.tables import read_table
from diffkiln.runtime.targets import choose_target
from diffkiln.runtime.trials import Trials
from diffkiln.runtime.variants import CompiledVariant

log = get_logger(__name__)


def read_json(verified: Verified, path: str) -> Any:
    """Returns the content of a JSON file of the bundle.

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
    """Returns every component's programs, verified."""
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
    """Returns one variant with its call programs, verified."""
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
    check_narrowed(programs)
    return CompiledVariant(variant.name, variant.fixed, programs)


def read_constants(verified: Verified) -> dict[str, torch.Tensor]:
    """Returns the folded tensors by key, on the CPU, from the hashed bytes."""
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
        # A byte that is neither 0 nor 1 is not a boolean: compilers take it for one or the other, as it suits them.
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
    device: torch.device,
    allow_native: bool,
    policy: Policy | None,
    check_engines: bool | None,
    absent: Collection[tuple[str, str]] = (),
) -> dict[tuple[str, str], Engine]:
    """Opens the engines of the target that fits; none if the bundle may be replayed on other machines.

    Those of `absent` regions, each of a component, are left alone.
    """
    manifest = verified.manifest
    if not manifest.engines:
        return {}
    try:
        target = choose_target(manifest, device, verified.targets)
        rows = [row for row in manifest.engines if row.target == target and (row.component, row.region) not in absent]
        trials = Trials(verified, rows, modules, device, check_engines)
        permit = authorise_native(verified, allow_native, policy)
        opened: dict[str, Engine] = {}  # by path: one engine may be for several regions
        found = {}
        for row in rows:
            region = _region_of(row, modules)
            if row.path not in opened:
                opened[row.path] = _open(permit.verified, row, region, constants, device, trials)
            found[row.component, row.region] = opened[row.path]
        if check_engines is not False and (there := accelerator(device)):
            there.release()  # what the comparisons took, which the weights need now
        return found
    except Incompatible as error:
        if manifest.runtime.get("on_incompatible") != "eager":
            raise
        log.warning("running without engines, as the bundle allows: %s", error)
        return {}


def _open(
    verified: Verified,
    row: EngineEntry,
    region: Program,
    constants: Mapping[str, torch.Tensor],
    device: torch.device,
    trials: Trials,
) -> Engine:
    what = f"engine {row.path}"
    engine = engine_class(row.backend)(verified.native_copy(row.path), row.inputs, device)
    if trials.wants(row.path):
        try:
            self_test(engine, region, constants, device, what)
        except DiffkilnError:
            raise
        except RuntimeError as error:
            raise Incompatible(f"{what} does not run here: {error}") from error
        trials.passed(row.path)
    return engine


def _region_of(row: EngineEntry, modules: Mapping[str, Module]) -> Program:
    """Returns the region that an engine is for.

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
