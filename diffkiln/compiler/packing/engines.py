"""`engines/`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from diffkiln.bundle import BundleWriter, EngineEntry
from diffkiln.bundle.layout import engine_folder
from diffkiln.compiler.packed import Packed, total
from diffkiln.errors import ExportError, VerifyError
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, exporter, foreign, input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.passes.base import CompileRequest
from diffkiln.program import Module, Program
from diffkiln.program.preambles import loop_regions
from diffkiln.program.sizes import Family, families
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.compatibility import capability, missing_flags
from diffkiln.runtime.engines import engine
from diffkiln.runtime.engines import learned as learned_by
from diffkiln.runtime.self_test import self_test
from diffkiln.spec import Target

#: Weights by their names in the component.
Weights = Mapping[str, torch.Tensor]
#: Relative path → content.
Files = Mapping[str, bytes]
_NONE: Weights = MappingProxyType({})


@dataclass(frozen=True)
class EnginesPacker:
    """The builder of engines: it tries each where it can run, and writes it into the bundle.

    Attributes:
        writer: of the bundle.
        cache: of engines.
        recording: the components' programs and the constants that they use.
        components: the modules that were recorded, so that an error can say where a region comes from.
    """

    writer: BundleWriter
    cache: EngineCache
    recording: Recording
    components: Mapping[str, torch.nn.Module] = field(default_factory=dict)

    def component(self, request: CompileRequest, targets: Sequence[Target], weights: Weights = _NONE) -> Packed:
        """Writes `engines/<target>/<component>/<Region>/`: a component's regions for every target.

        Regions that differ by sizes alone share an engine, where that is asked for and the backend can. `weights` are
        the component's, for engines that are to hold them.
        """
        module = self.recording.modules.get(request.component)
        families = _families(module, request.dynamic) if module else []
        packed = total(self.family(request, target, each, weights) for each in families for target in targets)
        return packed + Packed(notices=tuple(_alone(request, families)))

    def family(self, request: CompileRequest, target: Target, family: Family, weights: Weights = _NONE) -> Packed:
        """Writes the engines of regions that may share one, for one target."""
        if not family.ranges:
            return self._one_each(request, target, family, weights)
        try:
            return self._built(request, target, family.members, family, weights)
        except (ExportError, VerifyError) as error:
            names = ", ".join(member.name for member in family.members)
            notice = f"{request.component}: each of {names} has an engine of its own: {error}"
            return Packed(notices=(notice,)) + self._one_each(request, target, family, weights)

    def _one_each(self, request: CompileRequest, target: Target, family: Family, weights: Weights) -> Packed:
        packed = Packed()
        for region in family.members:
            try:
                packed += self._built(request, target, (region,), None, weights)
            except ExportError as error:
                origin = _origin(self.components.get(request.component), region)
                raise ExportError(f"{request.component}: {origin}{error}", problems=error.problems) from error
        return packed

    def _built(
        self,
        request: CompileRequest,
        target: Target,
        regions: tuple[Program, ...],
        family: Family | None,
        weights: Weights,
    ) -> Packed:
        """Builds one engine for all of these regions, tries it with each of them, and writes it."""
        first = regions[0]
        constants = {key: self.recording.constants.tensors[key] for key in first.constants}
        own = {name: weights[name] for name in first.weights if name in weights}
        lowering = Lowering(first, target, constants, dict(request.options), family, own)
        artefact = exporter(request.backend).export(lowering, self.cache)
        learned: Files = {}
        for region in regions:
            path = engine_folder(target.name, request.component, region.name)
            learned = _try_out(artefact, region, constants, target, path)
        notices = (*self._breaks(request, first), *_untried(artefact, target))
        return self._write(request, target, artefact, learned, regions) + Packed(notices=notices)

    def _breaks(self, request: CompileRequest, region: Program) -> list[str]:
        """Returns a notice for each place where the graph breaks, if it is allowed to, with the class of the region."""
        if not exporter(request.backend).may_break(request.options):
            return []
        origin = _origin(self.components.get(request.component), region)
        return [f"{request.component}: {origin}the graph breaks at {what}" for what in foreign(region)]

    def _write(
        self,
        request: CompileRequest,
        target: Target,
        artefact: Artefact,
        learned: Files,
        regions: Sequence[Program],
    ) -> Packed:
        """Writes an engine's files; returns a row for each region that it is for."""
        path = engine_folder(target.name, request.component, regions[0].name)
        for file in sorted(artefact.directory.rglob("*")):
            relative = file.relative_to(artefact.directory).as_posix()
            if file.is_file() and relative not in learned:
                self.writer.write(f"{path}/{relative}", file.read_bytes(), "native")
        for relative, data in learned.items():
            self.writer.write(f"{path}/{relative}", data, "native")
        rows = tuple(_engine_row(artefact, region, request, target, path) for region in regions)
        return Packed(engines=rows) + demands(target, artefact)


def _families(module: Module, dynamic: bool) -> list[Family]:
    ours = loop_regions(module)  # what runs once a request is replayed
    regions = [region for name, region in module.regions.items() if name in ours]
    return families(regions) if dynamic else [Family((region,), {}, {}) for region in regions]


def _alone(request: CompileRequest, families: Sequence[Family]) -> Iterator[str]:
    """Yields a notice for each class whose regions were to share an engine, and differ by more than their sizes."""
    by_class: dict[str, list[str]] = {}
    for family in families:
        if request.dynamic and not family.ranges:
            by_class.setdefault(family.members[0].recorded_from, []).append(family.members[0].name)
    for names in by_class.values():
        if len(names) > 1:
            shown = ", ".join(names)
            yield f"{request.component}: each of {shown} has an engine of its own: they differ by more than their sizes"


def _origin(component: torch.nn.Module | None, region: Program) -> str:
    """Returns the class that a region was recorded from, and its file; empty if unknown."""
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


def demands(target: Target, artefact: Artefact) -> Packed:
    """Returns what an engine demands of the machine that loads it. Demands on a GPU stand with their target."""
    requires = {name: artefact.requires[name] for name in ("glibc", "cuda", "driver") if name in artefact.requires}
    if "sm" not in artefact.requires:
        return Packed(requires=requires)
    row: dict[str, Any] = {"sm": artefact.requires["sm"]}
    if artefact.autotuned is not None:
        row["autotuned"] = artefact.autotuned
    if artefact.packages:
        row["packages"] = dict(artefact.packages)
    if artefact.exact:
        row["exact"] = True
    return Packed(requires=requires, gpus={target.name: row})


def _engine_row(artefact: Artefact, region: Program, request: CompileRequest, target: Target, path: str) -> EngineEntry:
    outputs = tuple(
        spec if spec.shape == region.types[ref.name].shape else contiguous(region.types[ref.name])
        for spec, ref in zip(artefact.outputs, region.outputs, strict=True)
    )
    return EngineEntry(
        target=target.name,
        component=request.component,
        region=region.name,
        backend=artefact.backend,
        path=path,
        inputs=input_specs(region),
        outputs=outputs,
        options=dict(artefact.options),
    )


def _try_out(
    artefact: Artefact, region: Program, constants: Mapping[str, torch.Tensor], target: Target, path: str
) -> Files:
    """Compares an engine with its region, so that no wrong one is published; returns the files that running it made."""
    if (device := device_for(target)) is None:
        return {}
    loaded = engine(artefact.backend)(artefact.directory, input_specs(region), device)
    on_device = {key: tensor.to(device) for key, tensor in constants.items()}
    self_test(loaded, region, on_device, device, path)
    return learned_by(loaded)


def _untried(artefact: Artefact, target: Target) -> list[str]:
    """Returns notices of what this machine could not do for an engine."""
    reasons = []
    if artefact.autotuned is False:
        reasons.append("were built without its GPU, so nothing is tuned: run `diffkiln retune` where it is")
    if device_for(target) is None:
        reasons.append("were not tried: this machine cannot run them")
    return [f"the engines for {target.name} {what}" for what in reasons]


def device_for(target: Target) -> torch.device | None:
    """Returns where this machine can run engines for a target; None if it cannot."""
    if target.device == "cuda":
        return torch.device("cuda") if capability() == target.capability else None
    return None if missing_flags(target.isa) else torch.device("cpu")
