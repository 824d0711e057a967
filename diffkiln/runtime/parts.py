"""What one of several processes needs of a bundle: programs, weights and engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffkiln.bundle import GroupEntry, Verified
from diffkiln.program import Mesh, Module, owner_of
from diffkiln.program.layers import own_call, own_modules
from diffkiln.program.mesh import LAYERS
from diffkiln.runtime.checking import without
from diffkiln.runtime.groups import keys_by_weight, read_groups
from diffkiln.runtime.variants import CompiledVariant


@dataclass(frozen=True)
class Part:
    """A process's part of a bundle.

    Attributes:
        modules, variants: what it runs.
        groups: the weights that it needs, as the manifest lists them.
        absent: (component, region) of regions that other processes alone run.
    """

    modules: Mapping[str, Module]
    variants: Sequence[CompiledVariant]
    groups: Mapping[str, Sequence[GroupEntry]]
    absent: frozenset[tuple[str, str]] = frozenset()


def part_of(
    verified: Verified,
    modules: Mapping[str, Module],
    variants: Sequence[CompiledVariant],
    mesh: Mesh | None,
    rank: int,
) -> Part:
    """Returns what a process needs.

    Args:
        verified: the bundle.
        modules, variants: all of it.
        mesh: the processes; None for one.
        rank: of this one.

    Raises:
        ManifestInvalid: a process runs a component that the manifest gives to the first one alone.
    """
    listed = verified.manifest.weights
    if mesh is None:
        return Part(modules, variants, listed)
    first: Any = verified.manifest.runtime.get("first") or ()
    gone = frozenset(first) if rank else frozenset[str]()
    programs = [
        replace(variant, programs={name: own_call(program, rank) for name, program in variant.programs.items()})
        for variant in variants
    ]
    calls = [program for variant in programs for program in variant.programs.values()]
    own = own_modules(without(gone, modules, calls), mesh, rank)
    groups: dict[str, Sequence[GroupEntry]] = {name: rows for name, rows in listed.items() if name not in gone}
    if mesh.count(LAYERS) > 1:
        keys = keys_by_weight(read_groups(verified, groups))
        read = [(name, weight) for name, module in own.items() for weight, _ in module.weight_types()]
        read += [owner_of(weight) for call in calls for weight in call.weights]
        needed = {keys[weight] for weight in read if weight in keys}
        groups = {name: [row for row in rows if (name, row.name) in needed] for name, rows in groups.items()}
    kept = {(name, region) for name, module in own.items() for region in module.regions}
    every = {(name, region) for name, module in modules.items() for region in module.regions}
    return Part(own, programs, groups, frozenset(every - kept))
