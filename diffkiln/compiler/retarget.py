"""Targets of a bundle that is there: engines for another, for one fewer, or built anew.

A bundle holds all that engines are built from: the regions' programs, their constants, and in the engines' rows how
they were built. So neither the source nor diffusers is needed, and nothing else changes: weights stay the same files.
What comes out is another bundle, with an id of its own, which takes the old one's place in one step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from diffkiln.bundle import devices_of
from diffkiln.bundle.scratch import scratch
from diffkiln.compiler.built import Built
from diffkiln.compiler.packing.editing import Edit
from diffkiln.compiler.stages import Progress
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.runtime.targets import choose
from diffkiln.spec import TARGETS, Target, suggest

Location = str | os.PathLike[str]


@gated("progress")
def add_target(
    bundle: Location,
    target: str,
    output: Location | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    cache: EngineCache | None = None,
) -> Built:
    """Builds a bundle's engines for one more target, from the bundle alone.

    Args:
        bundle: a whole bundle that has engines.
        target: a name that `diffkiln targets` lists.
        output: directory to make; by default the bundle itself is replaced, and its weights stay the same files.
        force: replace a bundle that is at `output`.
        progress: called with the name of each step when it begins.
        cache: of engines; the user's by default.

    Raises:
        SpecError: the target is unknown or there already, or the bundle has no engines to go by.
        IllegalPlan: its backend cannot build for that target.
        Incompatible: the bundle is for another torch than this one.
        IntegrityError: the bundle is not whole.
        BuildError: the build failed.
        VerifyError: a GPU would refuse an operator of a call.
    """
    with Edit(bundle, output, force, progress) as edit:
        wanted = _known(target)
        if target in edit.targets:
            raise SpecError(f"the bundle has engines for {target} already. It has them for {', '.join(edit.targets)}")
        edit.build([wanted], cache or EngineCache())
        return edit.publish(f"engines for {target} added")


@gated("progress")
def strip(
    bundle: Location,
    target: str | Sequence[str],
    output: Location | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Removes the engines for some targets from a bundle. At least one target stays.

    Args:
        bundle: a whole bundle.
        target: a name, or several.
        output: directory to make; by default the bundle itself is replaced, and its weights stay the same files.
        force: replace a bundle that is at `output`.
        progress: called with the name of each step when it begins.

    Raises:
        SpecError: the bundle has no engines for a target, or would have none at all.
        IntegrityError: the bundle is not whole.
        BuildError: the new bundle cannot be written.
    """
    names = [target] if isinstance(target, str) else list(target)
    with Edit(bundle, output, force, progress) as edit:
        if unknown := [name for name in names if name not in edit.targets]:
            hint = suggest(unknown[0], edit.targets)
            raise SpecError(
                f"the bundle has no engines for {', '.join(map(repr, unknown))}. It has them for "
                f"{', '.join(edit.targets)}. {hint}".rstrip()
            )
        if not set(edit.targets) - set(names):
            raise SpecError(
                "the bundle would be left without engines, and how to build them would be lost. Keep one target; a "
                "bundle that needs none is compiled from a spec without `compile`"
            )
        edit.remove(names)
        return edit.publish(f"engines for {', '.join(names)} removed")


@gated("progress")
def retune(
    bundle: Location,
    output: Location | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Rebuilds the engines for this machine's target on this machine, so that they are tuned for it.

    Raises:
        IllegalPlan: the engines are for a CPU, where nothing is tuned.
        Incompatible: this machine is none of the bundle's targets.
        SpecError, IntegrityError, BuildError: as `add_target`.
    """
    with Edit(bundle, output, force, progress) as edit:
        if "cuda" not in devices_of(edit.manifest):
            raise IllegalPlan(
                "engines for a CPU are not tuned on the machine that builds them, so building them anew would give the "
                "same ones"
            )
        name = str(choose(edit.manifest, torch.device("cuda")).target)
        wanted = edit.stated().get(name) or _known(name)
        edit.remove([wanted.name])
        with scratch("retune") as folder:
            edit.build([wanted], EngineCache(folder))  # what another machine found is not wanted
        return edit.publish(f"engines for {wanted.name} built anew")


def _known(name: str) -> Target:
    """Returns the target of that name. Raises `SpecError`."""
    if name not in TARGETS:
        hint = suggest(name, TARGETS) or "`diffkiln targets` lists them"
        raise SpecError(f"there is no target {name!r}. {hint}")
    return TARGETS[name]
