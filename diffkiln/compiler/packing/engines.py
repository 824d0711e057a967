"""`engines/`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from diffkiln.bundle import BundleWriter, EngineRow, TensorSpec
from diffkiln.compiler.packing.packed import Packed
from diffkiln.errors import ExportError, VerifyError
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, engine_inputs, foreign
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.registry import exporter
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.passes.base import CompileRequest
from diffkiln.program import Module, Program
from diffkiln.program.sizes import Family, families
from diffkiln.runtime.compatibility import capability, missing_flags
from diffkiln.runtime.engines import engine
from diffkiln.runtime.engines.base import learned as learned_by
from diffkiln.runtime.self_test import self_test
from diffkiln.spec import Target

#: Weights by their names in the component.
Weights = Mapping[str, torch.Tensor]
#: Relative path → content.
Files = Mapping[str, bytes]
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
    for artefact, learned, regions in _built_together(family, packed, request, target, cache, weights):
        _pack(writer, packed, request, target, artefact, learned, regions)


def _families(module: Module, dynamic: bool) -> list[Family]:
    regions = list(module.regions.values())
    return families(regions) if dynamic else [Family((region,), {}, {}) for region in regions]


def _built_together(
    family: Family, packed: Packed, request: CompileRequest, target: Target, cache: EngineCache, weights: Weights
) -> Iterator[tuple[Artefact, Files, tuple[Program, ...]]]:
    """Engines, each with what trying it made and the regions that it is for: one for all of them, or one for each."""

    def built(region: Program, whole: Family | None) -> tuple[Artefact, Files]:
        constants = _constants(packed, region)
        _tell_breaks(packed, request, region)
        own = {name: weights[name] for name in region.weights if name in weights}
        lowering = Lowering(region, target, constants, dict(request.options), whole, own)
        artefact = exporter(request.backend).export(lowering, cache)
        files: Files = {}
        for member in whole.members if whole else (region,):
            path = f"engines/{target.name}/{request.component}/{member.name}"
            files = _try_out(artefact, member, constants, target, path, packed.notices)
        return artefact, files

    if family.ranges:
        try:
            yield *built(family.members[0], family), family.members
            return
        except (ExportError, VerifyError) as error:
            names = ", ".join(member.name for member in family.members)
            packed.notices.append(f"{request.component}: each of {names} has an engine of its own: {error}")
    for region in family.members:
        try:
            yield *built(region, None), (region,)
        except ExportError as error:
            origin = _origin(packed.ghosts.get(request.component), region)
            raise ExportError(f"{request.component}: {origin}{error}", problems=error.problems) from error


def _tell_breaks(packed: Packed, request: CompileRequest, region: Program) -> None:
    """Where a graph is allowed to break, and does: each place once, with the class that it is in."""
    if request.options.get("fullgraph", True):
        return
    origin = _origin(packed.ghosts.get(request.component), region)
    for what in foreign(region):
        notice = f"{request.component}: {origin}the graph breaks at {what}"
        if notice not in packed.notices:
            packed.notices.append(notice)


def _origin(component: torch.nn.Module | None, region: Program) -> str:
    """The class that a region was recorded from, and where it is written; empty where neither is known."""
    if component is None:
        return ""
    kinds = {type(block).__name__: type(block) for _, block in repeated_blocks(component)}
    # A region that is no block is of the component itself.
    kind = kinds.get(region.recorded_from, type(component))
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
    learned: Files,
    regions: tuple[Program, ...],
) -> None:
    """An engine's files, and a row for each region that it is for."""
    path = f"engines/{target.name}/{request.component}/{regions[0].name}"
    for file in sorted(artefact.directory.rglob("*")):
        relative = file.relative_to(artefact.directory).as_posix()
        if file.is_file() and relative not in learned:
            writer.write(f"{path}/{relative}", file.read_bytes(), "native")
    for relative, data in learned.items():
        writer.write(f"{path}/{relative}", data, "native")
    _take_over_requirements(packed, target, artefact)
    for region in regions:
        packed.engines.append(_engine_row(artefact, region, request, target, path))


def _take_over_requirements(packed: Packed, target: Target, artefact: Artefact) -> None:
    """The newest that any engine asks for is what the bundle asks for; what is a GPU's stands with its target."""
    for name in ("glibc", "cuda", "driver"):
        stated = filter(None, (getattr(packed, name), artefact.requires.get(name)))
        setattr(packed, name, max(stated, key=_numbers, default=None))
    if (sm := artefact.requires.get("sm")) is None:
        return
    row = packed.gpus.setdefault(target.name, {"sm": sm})
    if row["sm"] == target.sm:  # `sm_90a` says more than `sm_90`
        row["sm"] = sm
    if artefact.autotuned is not None:
        row["autotuned"] = row.get("autotuned", True) and artefact.autotuned
    if artefact.packages:
        row["packages"] = {**row.get("packages", {}), **artefact.packages}
    if artefact.exact:
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
) -> Files:
    """An engine that is wrong is not published. One that this machine cannot run is said to be untried.

    Returns what running the engine made, to be kept beside it.
    """
    told = []
    if artefact.autotuned is False:
        told.append("were built without its GPU, so nothing is tuned: run `diffkiln retune` where it is")
    if (device := place_of(target)) is None:
        told.append("were not tried: this machine cannot run them")
    for what in told:
        if (notice := f"the engines for {target.name} {what}") not in notices:
            notices.append(notice)
    if device is None:
        return {}
    loaded = engine(artefact.backend)(artefact.directory, _inputs(region), device)
    on_device = {key: tensor.to(device) for key, tensor in constants.items()}
    self_test(loaded, region, on_device, device, path)
    return learned_by(loaded)


def place_of(target: Target) -> torch.device | None:
    """Where this machine can run engines for a target; None if it cannot."""
    if target.device == "cuda":
        return torch.device("cuda") if capability() == target.capability else None
    return None if missing_flags(target.isa) else torch.device("cpu")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
