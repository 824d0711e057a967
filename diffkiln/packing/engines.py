"""`engines/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diffkiln.bundle import BundleWriter, EngineRow, TensorSpec
from diffkiln.exporters.base import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.registry import exporter
from diffkiln.packing.packed import Packed
from diffkiln.passes.base import CompileRequest
from diffkiln.program import Program
from diffkiln.runtime.compatibility import missing_flags
from diffkiln.runtime.engines import engine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec import Target


def pack_engines(
    writer: BundleWriter, packed: Packed, request: CompileRequest, targets: Sequence[Target], cache: EngineCache
) -> None:
    """`engines/<target>/<component>/<Region>/`: a component's regions for every target, tried where they can run."""
    module = packed.recording.modules.get(request.component)
    for region in module.regions.values() if module else ():
        constants = {key: packed.recording.constants.tensors[key] for key in region.constants}
        for target in targets:
            lowering = Lowering(region, target, constants, dict(request.options))
            artefact = exporter(request.backend).export(lowering, cache)
            path = f"engines/{target.name}/{request.component}/{region.name}"
            _try_out(artefact, region, constants, target, path, packed.notices)
            for file in sorted(artefact.directory.rglob("*")):
                if file.is_file():
                    relative = file.relative_to(artefact.directory).as_posix()
                    writer.write(f"{path}/{relative}", file.read_bytes(), "native")
            packed.glibc = max(filter(None, (packed.glibc, artefact.requires.get("glibc"))), key=_numbers, default=None)
            packed.engines.append(_engine_row(artefact, region, request, target, path))


def _engine_row(artefact: Artefact, region: Program, request: CompileRequest, target: Target, path: str) -> EngineRow:
    return EngineRow(
        target=target.name,
        component=request.component,
        region=region.name,
        backend=artefact.backend,
        path=path,
        inputs=tuple(TensorSpec.model_validate(spec) for spec in artefact.inputs),
        outputs=tuple(TensorSpec.model_validate(spec) for spec in artefact.outputs),
        options=dict(artefact.options),
    )


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
    loaded = engine(artefact.backend)(artefact.directory, artefact.inputs, device)
    self_test(loaded, region, constants, device, path)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
