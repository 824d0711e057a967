"""What changes in a bundle with its targets: rows of engines, the manifest's summaries of them, and `spec.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln.bundle import EngineEntry, FileEntry, Manifest, device_features, device_policy, engine_targets
from diffkiln.bundle.layout import SPEC
from diffkiln.compiler.packed import Packed, as_json
from diffkiln.errors import ManifestInvalid
from diffkiln.passes.base import CompileRequest
from diffkiln.program import Module
from diffkiln.program.sizes import Family, families
from diffkiln.spec import Target, TargetSpec, resolve_target


@dataclass(frozen=True)
class Group:
    """Regions that share an engine, or one region that has its own, and how it was built."""

    request: CompileRequest
    regions: tuple[str, ...]

    def family(self, module: Module) -> Family:
        """Returns the regions' programs as they are lowered together."""
        programs = [module.regions[name] for name in self.regions]
        found = families(programs) if len(programs) > 1 else []
        return found[0] if len(found) == 1 else Family((programs[0],), {}, {})


def groups_of(manifest: Manifest, modules: Mapping[str, Module], target: str | None = None) -> list[Group]:
    """Returns the engines of a target, by default the first, in their order.

    Raises:
        ManifestInvalid: one is for a region that the bundle does not have, or regions share one that differ.
    """
    target = target or engine_targets(manifest)[0]
    together: dict[str, list[EngineEntry]] = {}
    for row in manifest.engines:
        if row.target == target:
            together.setdefault(row.path, []).append(row)
    groups = []
    for path, rows in together.items():
        first, regions = rows[0], tuple(row.region for row in rows)
        module = modules.get(first.component)
        if module is None or not set(regions) <= module.regions.keys():
            raise ManifestInvalid(
                f"engine {path} is for {first.component}/{regions[0]}, which the bundle does not have"
            )
        group = Group(CompileRequest(first.component, first.backend, first.options), regions)
        if len(group.family(module).members) != len(regions):
            raise ManifestInvalid(f"engine {path} is for {', '.join(regions)}, which differ by more than their sizes")
        groups.append(group)
    return groups


def retargeted(
    manifest: Manifest,
    files: tuple[FileEntry, ...],
    engines: Sequence[EngineEntry],
    isas: Mapping[str, str],
    devices: Mapping[str, str],
    packed: Packed,
) -> Manifest:
    """Returns the manifest with these files and engines.

    Args:
        manifest: the old one.
        files: the new files.
        engines: the new engines, in any order.
        isas: the instruction set of each target, in the targets' order.
        devices: the device of each.
        packed: what the engines that were built ask of the machine, on top of what the old manifest asks.
    """
    ordered = _ordered(manifest, engines, list(isas))
    gpu = "cuda" in devices.values()
    asked = {
        "glibc": packed.requires.get("glibc"),
        "cuda": packed.requires.get("cuda") if gpu else None,
        "driver": packed.requires.get("driver") if gpu else None,
    }
    requires = manifest.requires.model_copy(update={"cpu_isa": min(isas.values()), **asked})
    before: Any = manifest.runtime.get("gpus", {})
    gpus = {**before, **packed.gpus}
    kept = {name: value for name, value in manifest.runtime.items() if name not in ("devices", "gpus")}
    runtime: dict[str, Any] = {**kept, **device_policy(devices), "targets": dict(isas)}
    if used := {name: gpus[name] for name in isas if name in gpus}:
        runtime["gpus"] = used
    features = device_features(manifest.features_required, devices)
    changed = {"files": files, "engines": ordered, "requires": requires, "runtime": runtime}
    return manifest.model_copy(update={**changed, "features_required": features})


def _ordered(manifest: Manifest, engines: Sequence[EngineEntry], targets: Sequence[str]) -> tuple[EngineEntry, ...]:
    """Orders engines as a compile for all targets at once does, by engine and then by target, so the id is the same."""
    first = engine_targets(manifest)[0]
    paths = list(dict.fromkeys(row.path for row in manifest.engines if row.target == first))
    position = {(row.component, row.region): paths.index(row.path) for row in manifest.engines if row.target == first}
    return tuple(
        sorted(
            engines, key=lambda row: (position.get((row.component, row.region), len(paths)), targets.index(row.target))
        )
    )


def isas_of(manifest: Manifest) -> dict[str, str]:
    """Returns the instruction set of each target that has engines, in their order.

    Raises:
        ManifestInvalid: one is not said.
    """
    stated: Any = manifest.runtime.get("targets")
    names = engine_targets(manifest)
    if not isinstance(stated, dict) or not all(isinstance(stated.get(name), str) for name in names):
        raise ManifestInvalid("the manifest lacks the instruction set of a target. Compile the bundle again")
    return {name: stated[name] for name in names}


def spec_for(data: bytes, removed: Sequence[str] = (), added: Sequence[Target] = ()) -> bytes:
    """Returns `spec.json` for other targets: a list, or the only one that is left.

    Raises:
        ManifestInvalid: it is no spec.
    """
    spec, entries = _read(data)
    again = {target.name for target in added}  # what is built anew stands as it stood
    entries = [entry for entry in entries if (name := resolve_target(entry).name) not in removed or name in again]
    stated = {resolve_target(entry).name for entry in entries}
    entries += [_entry(target) for target in added if target.name not in stated]
    written = [entry.model_dump(mode="json", exclude_none=True) for entry in entries]
    return as_json(spec | {"target": written[0] if len(written) == 1 else written})


def targets_in(data: bytes) -> dict[str, Target]:
    """Returns the targets of a `spec.json` by name, including those described by numbers.

    Raises:
        ManifestInvalid: it is no spec.
    """
    targets = [resolve_target(entry) for entry in _read(data)[1]]
    return {target.name: target for target in targets}


def _read(data: bytes) -> tuple[dict[str, Any], list[TargetSpec]]:
    try:
        spec = json.loads(data)
        stated = spec["target"]
        return spec, [TargetSpec.model_validate(entry) for entry in (stated if isinstance(stated, list) else [stated])]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ManifestInvalid(f"{SPEC!r} is not a spec: {error}") from None


def _entry(target: Target) -> TargetSpec:
    """Returns a spec's entry for a target that has a name."""
    if target.device == "cpu":
        return TargetSpec(device="cpu", isa=target.isa)
    return TargetSpec(device="cuda", gpu=target.name)
