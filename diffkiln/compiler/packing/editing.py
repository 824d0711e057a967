"""A bundle that is made of another one: its files are kept, its engines changed, and it is published as any other."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from diffkiln.bundle import (
    Bundle,
    BundleWriter,
    FileEntry,
    Manifest,
    device_of,
    devices_of,
    engine_targets,
    has_receipt,
    left_out,
    open_bundle,
    write_receipt,
)
from diffkiln.bundle.card import card
from diffkiln.bundle.layout import BUILD, CARD, SCHEMAS, SPEC
from diffkiln.compiler.built import Built
from diffkiln.compiler.dry_run import dry_run
from diffkiln.compiler.packed import Packed, as_json
from diffkiln.compiler.packing.engines import EnginesPacker
from diffkiln.compiler.packing.targets import Group, groups_of, isas_of, retargeted, spec_for, targets_in
from diffkiln.compiler.stages import Progress, Stages
from diffkiln.errors import IllegalPlan, Problem, SpecError
from diffkiln.exporters.base import exporter
from diffkiln.exporters.cache import EngineCache
from diffkiln.interpreter.aten import check_schemas
from diffkiln.program import Module, Program
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.compatibility import check_target
from diffkiln.runtime.opening import read_constants, read_json, read_modules, read_variant
from diffkiln.spec import Target
from diffkiln.version import __version__


class Edit:
    """A context manager for an existing bundle, and the one that is made of it with other engines.

    The new bundle takes the old one's place, unless another output is given. The output is locked all the while.

    Entering raises `SpecError` for a bundle whose engines cannot be changed, `IntegrityError` for one that is not
    whole, and whatever entering `BundleWriter` raises.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        output: str | os.PathLike[str] | None,
        force: bool,
        progress: Progress | None,
    ) -> None:
        self._stated = bundle
        self._writer = BundleWriter(bundle if output is None else output, force or output is None)
        self._stages = Stages(progress)
        self._removed: list[str] = []
        self._added: list[Target] = []

    def __enter__(self) -> Edit:
        with ExitStack() as stack:
            stack.enter_context(self._writer)
            self._bundle = stack.enter_context(open_bundle(self._stated))
            _check_editable(self._bundle)
            self.manifest = self._bundle.manifest
            self.targets = engine_targets(self.manifest)
            self._isas = isas_of(self.manifest)
            with self._stages("check the bundle"):
                # Weights are taken over as they are: whoever loads them compares them with their digests.
                roles = {"config", "program", "native", "doc"}
                self._verified = stack.enter_context(self._bundle.verify(roles=roles))  # pyright: ignore[reportArgumentType]
            self._packed = _packed(self.manifest)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def stated(self) -> Mapping[str, Target]:
        """Returns the targets of the bundle's spec, by name."""
        return targets_in(self._verified.read(SPEC))

    def remove(self, names: Sequence[str]) -> None:
        """Leaves out the engines for these targets."""
        self._removed += names

    def build(self, targets: Sequence[Target], cache: EngineCache) -> None:
        """Builds the engines for these targets in the way of the bundle's first target.

        Raises:
            IllegalPlan: a backend cannot build for a target.
            Incompatible: the bundle is for another torch, Python or operating system.
            BuildError: there is no room, or the build failed.
            VerifyError: a GPU would refuse an operator of a call.
        """
        asked: dict[str, Any] = {"packages": {}, "sm": None}
        if all(target.device == "cpu" for target in targets):
            asked |= {"cuda": None, "driver": None}
        check_target(self.manifest.requires.model_copy(update=asked), None, native=True)
        check_schemas(read_json(self._verified, SCHEMAS))
        modules = read_modules(self._verified)
        groups = groups_of(self.manifest, modules)
        _check_buildable(self.manifest, groups, modules, targets)
        self._writer.require_space(self._size(targets))
        recording = Recording(self._calls(modules), modules, Constants(read_constants(self._verified)), [])
        if any(target.device == "cuda" for target in targets):
            with self._stages("run the call on fake GPU tensors"):
                graphs: Any = self.manifest.runtime.get("cuda_graphs")
                dry_run(recording, graphs)
        engines = EnginesPacker(self._writer, cache, recording)
        for group in groups:
            component = group.request.component
            for target in targets:
                with self._stages(f"compile the blocks of {component} for {target.name}"):
                    family = group.family(modules[component])
                    self._packed += engines.family(group.request, target, family)
        self._added += targets

    def _calls(self, modules: Mapping[str, Module]) -> list[dict[str, Program]]:
        """Returns the call programs of each variant, by name."""
        count = len(self.manifest.pipeline.variants)
        return [dict(read_variant(self._verified, index, modules).programs) for index in range(count)]

    def publish(self, what: str) -> Built:
        """Writes the other files and takes the output's place. `what` describes the edit in `build.json`."""
        old = self._bundle.id
        self._note(f"the bundle has a new id: signatures and statements about {old} do not cover it")
        with self._stages("publish"):
            kept = self._keep()
            known = has_receipt(old) or not any(row.role == "native" for row in kept)
            if not known:
                self._note(
                    "the bundle has no receipt, since it holds native code that was not built here: loading it needs "
                    "allow_native=True, or --allow-native"
                )
            identity = self._writer.publish(self._manifest, lambda manifest: self._report(manifest, what))
        if known:
            write_receipt(identity)
        return Built(self._writer.output, identity, self._packed.notices, dict(self._stages.seconds))

    def _note(self, notice: str) -> None:
        self._packed += Packed(notices=(notice,))

    def _size(self, targets: Sequence[Target]) -> int:
        """Returns an estimate of the new bundle's size: the copied files, and engines as for the first target."""
        moved = self._writer.output != self._bundle.path
        copied = sum(row.size for row in self.manifest.files if moved or row.role != "weights")
        others = left_out(self.manifest, self.targets[1:])
        engines = sum(row.size for row in self.manifest.files if row.path in others)
        return copied + engines * len(targets)

    def _keep(self) -> list[FileEntry]:
        gone = left_out(self.manifest, [name for name in self.targets if name not in self._removed])
        kept = [row for row in self.manifest.files if row.path not in gone and row.path != SPEC]
        for row in kept:
            self._writer.keep(row, self._verified)
        spec = spec_for(self._verified.read(SPEC), self._removed, self._added)
        self._writer.write(SPEC, spec, "config")
        return kept

    def _manifest(self, rows: tuple[FileEntry, ...]) -> Manifest:
        new = {target.name: target.isa for target in self._added}
        isas = {name: isa for name, isa in self._isas.items() if name not in self._removed or name in new} | new
        added = {target.name: target.device for target in self._added}
        devices = {name: added.get(name) or device_of(self.manifest, name) for name in isas}
        kept = [row for row in self.manifest.engines if row.target not in self._removed]
        return retargeted(self.manifest, rows, [*kept, *self._packed.engines], isas, devices, self._packed)

    def _report(self, manifest: Manifest, what: str) -> None:
        """Writes `build.json` and `README.md`: those of the first build, with a note of this edit."""
        build = dict(self._bundle.build)
        stale = tuple(f"the engines for {name} were" for name in self._removed)
        kept = [notice for notice in _list(build, "notices") if not str(notice).startswith(stale or ("\0",))]
        step = {
            "what": what,
            "diffkiln": __version__,
            "torch": torch.__version__,
            "host": {"machine": platform.machine(), "system": platform.platform()},
            "seconds": {name: round(value, 3) for name, value in self._stages.seconds.items()},
        }
        build |= {"notices": [*kept, *self._packed.notices], "edits": [*_list(build, "edits"), step]}
        self._writer.write_unhashed(BUILD, as_json(build))
        self._writer.write_unhashed(CARD, card(manifest, build).encode())


def _packed(manifest: Manifest) -> Packed:
    asked = {name: getattr(manifest.requires, name) for name in ("glibc", "cuda", "driver")}
    return Packed(requires={name: version for name, version in asked.items() if version})


def _check_editable(bundle: Bundle) -> None:
    """Raises `SpecError`."""
    if not bundle.manifest.engines:
        raise SpecError(
            f"{bundle.path} has no engines, so it runs on every machine and has no targets. To have some, add "
            "`compile` to its spec and compile it"
        )
    if not bundle.whole:
        raise SpecError(
            f"{bundle.path} was pulled with the engines for {', '.join(bundle.targets) or 'no target'} alone, and its "
            "targets can only be changed as a whole. Pull it again with --all-targets"
        )


def _check_buildable(
    manifest: Manifest, groups: Sequence[Group], modules: Mapping[str, Module], targets: Sequence[Target]
) -> None:
    """Raises `IllegalPlan` with every reason, each once."""
    devices = devices_of(manifest)
    only = " and ".join(sorted(devices))
    hint = "Compile the spec for all of its targets: passes are checked against each device."
    problems = [
        Problem(target.name, f"its device is {target.device}, and the bundle runs on {only}", hint)
        for target in targets
        if target.device not in devices
    ]
    for group in groups:
        backend = exporter(group.request.backend)
        if backend.holds_weights(group.request.options):
            reason = f"the engines of {group.request.component} hold weights, which only compiling a spec has at hand"
            problems.append(Problem("", reason, "Compile the spec for all of its targets."))
        for name in group.regions:
            region = modules[group.request.component].regions[name]
            for target in targets:
                problems += backend.check(region, target, group.request.options)
    if problems:
        raise IllegalPlan(problems=list(dict.fromkeys(problems)))


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return value if isinstance(value, list) else []
