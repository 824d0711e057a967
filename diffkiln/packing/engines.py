"""`engines/`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from diffkiln.bundle import BundleWriter, EngineRow, TensorSpec
from diffkiln.errors import ExportError, VerifyError
from diffkiln.exporters.base import Artefact, Lowering, contiguous, engine_inputs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.registry import exporter
from diffkiln.layers import repeated_blocks
from diffkiln.packing.packed import Packed
from diffkiln.passes.base import CompileRequest
from diffkiln.program import Module, Program
from diffkiln.program.sizes import Family, families
from diffkiln.runtime.compatibility import missing_flags
from diffkiln.runtime.engines import engine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec import Target

#: Weights by their names in the component.
Weights = Mapping[str, torch.Tensor]
_NONE: Weights = MappingProxyType({})


def pack_engines(
    writer: BundleWriter,
    packed: Packed,
    request: CompileRequest,
    targets: Sequence[Target],
    cache: EngineCache,
    weights: Weights = _NONE,
) -> None:
    """`engines/<target>/<component>/<Region>/`: a component's regions for every target, tried where they can run.

    Regions that differ by sizes alone share an engine, where that is asked for and the backend can. `weights` are the
    component's, for engines that are to hold them.
    """
    module = packed.recording.modules.get(request.component)
    for family in _families(module, request.dynamic) if module else ():
        for target in targets:
            pack_family(writer, packed, request, target, family, cache, weights)


def pack_family(
    writer: BundleWriter,
    packed: Packed,
    request: CompileRequest,
    target: Target,
    family: Family,
    cache: EngineCache,
    weights: Weights = _NONE,
) -> None:
    """The engines of regions that may share one, for one target."""
    for artefact, regions in _built_together(family, packed, request, target, cache, weights):
        _pack(writer, packed, request, target, artefact, regions)


def _families(module: Module, dynamic: bool) -> list[Family]:
    regions = list(module.regions.values())
    return families(regions) if dynamic else [Family((region,), {}, {}) for region in regions]


def _built_together(
    family: Family, packed: Packed, request: CompileRequest, target: Target, cache: EngineCache, weights: Weights
) -> Iterator[tuple[Artefact, tuple[Program, ...]]]:
    """Engines, each with the regions that it is for: one for all of them, or one for each."""

    def built(region: Program, whole: Family | None) -> Artefact:
        constants = _constants(packed, region)
        own = {name: weights[name] for name in region.weights if name in weights}
        lowering = Lowering(region, target, constants, dict(request.options), whole, own)
        artefact = exporter(request.backend).export(lowering, cache)
        for member in whole.members if whole else (region,):
            path = f"engines/{target.name}/{request.component}/{member.name}"
            _try_out(artefact, member, constants, target, path, packed.notices)
        return artefact

    if family.ranges:
        try:
            yield built(family.members[0], family), family.members
            return
        except (ExportError, VerifyError) as error:
            names = ", ".join(member.name for member in family.members)
            packed.notices.append(f"{request.component}: each of {names} has an engine of its own: {error}")
    for region in family.members:
        try:
            yield built(region, None), (region,)
        except ExportError as error:
            origin = _origin(packed.ghosts.get(request.component), region)
            raise ExportError(f"{request.component}: {origin}{error}", problems=error.problems) from error


def _origin(component: torch.nn.Module | None, region: Program) -> str:
    """The class that a region was recorded from, and where it is written; empty where neither is known."""
    if component is None:
        return ""
    kinds = {type(block).__name__: type(block) for _, block in repeated_blocks(component)}
    # Regions of one class that differ have numbers; one that is no block is of the component itself.
    kind = kinds.get(region.name.split("-")[0], type(component))
    try:
        line = inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):  # a class without a file
        return f"{kind.__name__} ({kind.__module__}): "
    return f"{kind.__name__} ({kind.__module__}, {inspect.getsourcefile(kind)}, line {line}): "


def _constants(packed: Packed, region: Program) -> dict[str, torch.Tensor]:
    return {key: packed.recording.constants.tensors[key] for key in region.constants}


def _pack(
    writer: BundleWriter,
    packed: Packed,
    request: CompileRequest,
    target: Target,
    artefact: Artefact,
    regions: tuple[Program, ...],
) -> None:
    """An engine's files, and a row for each region that it is for."""
    path = f"engines/{target.name}/{request.component}/{regions[0].name}"
    for file in sorted(artefact.directory.rglob("*")):
        if file.is_file():
            relative = file.relative_to(artefact.directory).as_posix()
            writer.write(f"{path}/{relative}", file.read_bytes(), "native")
    packed.glibc = max(filter(None, (packed.glibc, artefact.requires.get("glibc"))), key=_numbers, default=None)
    if target.device == "cuda":
        _tell_gpu(packed.gpus.setdefault(target.name, {"sm": target.sm}), artefact)
    for region in regions:
        packed.engines.append(_engine_row(artefact, region, request, target, path))


def _tell_gpu(row: dict[str, Any], artefact: Artefact) -> None:
    """Add to what the manifest says of a GPU's engines what this one needs."""
    if artefact.packages:
        row["packages"] = {**row.get("packages", {}), **artefact.packages}
    if "sm" in artefact.requires:  # its code is for that one, and no later one runs it
        row["exact"] = True


def _engine_row(artefact: Artefact, region: Program, request: CompileRequest, target: Target, path: str) -> EngineRow:
    outputs = tuple(
        spec if spec.shape == region.types[ref.name].shape else contiguous(region.types[ref.name])
        for spec, ref in zip(artefact.outputs, region.outputs, strict=True)
    )
    return EngineRow(
        target=target.name,
        component=request.component,
        region=region.name,
        backend=artefact.backend,
        path=path,
        inputs=_inputs(region),
        outputs=outputs,
        options=dict(artefact.options),
    )


def _inputs(region: Program) -> tuple[TensorSpec, ...]:
    return tuple(contiguous(type_) for type_ in engine_inputs(region))


def _try_out(
    artefact: Artefact,
    region: Program,
    constants: Mapping[str, torch.Tensor],
    target: Target,
    path: str,
    notices: list[str],
) -> None:
    """An engine that is wrong is not published. One that this machine cannot run is said to be untried."""
    if target.device != "cpu" or missing_flags(target.isa):
        notice = f"the engines for {target.name} were not tried: this machine cannot run them"
        if notice not in notices:
            notices.append(notice)
        return
    device = torch.device("cpu")
    loaded = engine(artefact.backend)(artefact.directory, _inputs(region), device)
    self_test(loaded, region, constants, device, path)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
