"""The whole way from a spec to a bundle. It reads top to bottom as a spec goes:

    spec ─check─▶ plan ─model passes─▶ ghosts ─record─▶ program ─engines─▶ weights ─publish─▶ bundle

Nothing before the weights needs them: the pipeline that is checked, transformed and recorded is a *ghost*, whose
tensors have shapes and no data. Weights are then streamed through the same passes, a few blocks at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffkiln.bundle import BundleWriter, write_receipt
from diffkiln.compiler.built import Built
from diffkiln.compiler.calibrate import Metric, calibrated
from diffkiln.compiler.dry_run import dry_run
from diffkiln.compiler.legality import is_schedule, problems_of, too_large
from diffkiln.compiler.memory import keep_large_tensors_apart
from diffkiln.compiler.packing import (
    Packed,
    as_json,
    manifest_of,
    pack_configuration,
    pack_engines,
    pack_licences,
    pack_programs,
    pack_report,
)
from diffkiln.compiler.stages import Progress, Steps
from diffkiln.compiler.verify import Verification
from diffkiln.compiler.weights import stream_weights
from diffkiln.errors import RecordError, found_together
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.interpreter.layers.scaled import row_scales
from diffkiln.models.meta import ghost_pipeline, load_module
from diffkiln.models.opening import open_source
from diffkiln.models.quiet import quiet_libraries
from diffkiln.models.source import SourceModel
from diffkiln.passes import manager
from diffkiln.passes.base import Fact, Pass, Plan
from diffkiln.passes.cache_schedule import CacheSchedule
from diffkiln.passes.calibrate import Calibrate
from diffkiln.passes.guidance import notices_of
from diffkiln.passes.registry import Placed, read_passes
from diffkiln.record.call import Request
from diffkiln.record.constants import Constants
from diffkiln.record.lengths import of_fixed_length
from diffkiln.record.pipeline import Recording, record
from diffkiln.record.requests import requests_of
from diffkiln.record.steps import steps_with, wanted_steps
from diffkiln.spec import Spec, Target, as_tuple, parse_spec, resolve_targets

SpecLike = Spec | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """A spec that can be compiled, as far as configuration shows.

    Attributes:
        plan: the components as the passes leave them, without weights.
        report: what each pass does.
        bytes_before, bytes_after: of each component's weights, before and after the passes.
        notices: what a user should know, such as components that are left out.
    """

    spec: Spec
    targets: tuple[Target, ...]
    source: SourceModel
    requests: tuple[Request, ...]
    placed: tuple[Placed, ...]
    pipe: Any
    plan: Plan
    report: tuple[manager.Ran, ...]
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    notices: tuple[str, ...]

    @property
    def dtype(self) -> str | None:
        return self.spec.source.dtype

    def with_step(self, place: Placed, step: Pass) -> Checked:
        """The same with another pass in one place."""
        new = replace(place, step=step)
        placed = tuple(new if item is place else item for item in self.placed)
        notes = step.run(self.plan).notes
        report = tuple(replace(r, placed=new, notes=notes) if r.placed is place else r for r in self.report)
        return replace(self, placed=placed, report=report)


@gated()
def check(spec: SpecLike, *, base: str | Path | None = None, limits: Limits | None = None) -> Checked:
    """Check a spec from configuration alone: no weight is read, nothing is built.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        base: folder that the source's relative path starts from; the spec file's by default.
        limits: what the source and its adapters may ask for; the defaults of `Limits` where it is not given.

    Raises:
        SpecError: the spec or its source is wrong.
        LimitExceeded: the source asks for more than `limits`.
        IllegalPlan: passes that the model or the target does not allow, all of them.
    """
    with applied(limits), _collection_paused():
        return _check(spec, base)


def _check(spec: SpecLike, base: str | Path | None) -> Checked:
    parsed = parse_spec(spec if isinstance(spec, Spec) else _spec_source(spec))
    home = _base(spec, base)
    placed, targets, source = found_together(
        lambda: read_passes(parsed.passes),
        lambda: resolve_targets(parsed),
        lambda: open_source(parsed.source, home),
    )
    placed = [replace(item, step=item.step.prepare(home, source.pipeline_class)) for item in placed]
    pipe = ghost_pipeline(source, parsed.source.dtype)
    pipe.set_progress_bar_config(disable=True)
    requests = requests_of(parsed, pipe)
    facts = frozenset(Fact("gguf", name, "source.gguf") for name in source.gguf)
    plan = Plan(
        source.class_name,
        {name: pipe.components[name] for name in source.modules},
        facts,
        variants=tuple({**request.fixed, "batch_size": request.batch_size} for request in requests),
        scheduler=getattr(pipe, "scheduler", None),
        ranged=any(entry.has_ranges for entry in as_tuple(parsed.inputs)),
    )
    if len(plan.denoisers) == 1:
        wanted = tuple(dict.fromkeys(wanted_steps(pipe, request) for request in requests))
        counts = tuple(dict.fromkeys(steps_with(plan.scheduler, count) for count in wanted)) if all(wanted) else ()
        plan = replace(plan, wanted_steps=wanted, steps=counts)
    before = {name: manager.nbytes(module) for name, module in plan.modules.items()}
    found = [*problems_of(parsed, placed, targets), *too_large(plan, placed, targets)]
    plan, report = manager.run(plan, placed, targets, found)
    if plan.scheduler is not None:
        pipe.register_modules(scheduler=plan.scheduler)
    after = before | {ran.placed.step.component: ran.nbytes for ran in report if ran.placed.step.component in before}
    return Checked(
        parsed, targets, source, tuple(requests), tuple(placed), pipe, plan, tuple(report), before, after,
        tuple(source.notices),
    )  # fmt: skip


@gated("progress")
def compile(
    spec: SpecLike,
    output: str | Path,
    *,
    force: bool = False,
    base: str | Path | None = None,
    progress: Progress | None = None,
    cache: EngineCache | None = None,
    metrics: Mapping[str, Metric] | None = None,
    limits: Limits | None = None,
) -> Built:
    """Compile a spec into a bundle. The output appears whole, at the end, or not at all.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        output: directory to make; one that exists is refused.
        force: replace a bundle that is there.
        base: folder that the source's relative path starts from; the spec file's by default.
        progress: called with the name of each step when it begins.
        cache: of engines; the user's by default.
        metrics: what a `calibrate` may name besides psnr: functions of images [n, …] from 0 to 1 and their prompts.
        limits: as for `check`.

    Raises:
        SpecError, IllegalPlan: as `check`; also for an output that exists.
        BuildError: the build failed; its subclasses say where.
    """
    steps = Steps(progress)
    keep_large_tensors_apart()
    with applied(limits), BundleWriter(output, force) as writer:
        with steps("check"):
            checked = check(spec, base=base)
            writer.require_space(sum(checked.bytes_after.values()))
        notices = list(checked.notices)
        with steps("record"), quiet_libraries(), _collection_paused():
            recording = _record(checked, notices)
            manager.check_recording(recording, checked.placed, checked.targets)
        verification = Verification(checked.pipe, recording)
        with steps("verify the recording"), quiet_libraries():
            for index, request in enumerate(checked.requests if recording.calls else ()):
                verification.check_call(request, recording.calls[index])
        chosen = _calibrate(checked, recording, metrics or {}, steps, writer)
        with quiet_libraries():
            recording, told = manager.rewrite(recording, chosen.placed)
        notices += told
        if any(target.device == "cuda" for target in checked.targets):
            with steps("run the call on fake GPU tensors"):
                dry_run(recording, checked.spec.runtime.cuda_graphs)
        compiled = {request.component for request in checked.plan.compile}
        notices += notices_of(chosen.placed, compiled, recording.modules)
        packed = Packed(recording, checked.spec.runtime.offload, notices, ghosts=checked.plan.modules)
        with steps("write the programs"):
            pack_configuration(writer, checked)
            pack_licences(writer, checked)
            pack_programs(writer, packed, checked.requests, checked.pipe)
        engines = cache or EngineCache()
        for request in checked.plan.compile:
            if not request.holds_weights:
                with steps(f"compile the blocks of {request.component}"):
                    pack_engines(writer, packed, request, checked.targets, engines)
        held = frozenset(request.component for request in checked.plan.compile if request.holds_weights)
        used = recording.weight_types(held)
        for name in checked.plan.modules:
            with steps(f"weights of {name}"):
                packed.weights[name] = stream_weights(
                    checked, name, writer, packed, verification, frozenset(used.get(name, ())), engines
                )
        with steps("publish"):
            identity = writer.publish(
                lambda rows: manifest_of(rows, packed, chosen),
                lambda manifest: pack_report(
                    writer, manifest, packed.notices, chosen.source, chosen.report, steps.seconds
                ),
            )
    write_receipt(identity)
    return Built(writer.output, identity, tuple(notices), dict(steps.seconds))


def _record(checked: Checked, notices: list[str]) -> Recording:
    """The recording; one that is empty and says why, where the spec lets the bundle run as diffusers."""
    try:
        recording = record(checked.pipe, checked.requests, Constants())
    except RecordError as error:
        if checked.spec.runtime.on_unrecordable != "diffusers":
            mend = 'To make a bundle that runs as diffusers, set "on_unrecordable": "diffusers" in "runtime".'
            raise type(error)(f"{checked.source.class_name} cannot be recorded: {error}. {mend}") from error
        if checked.plan.compile:
            notices.append("no engines are built, since the call could not be recorded")
        return Recording([], {}, Constants(), [], [], reason=str(error))
    notices += recording.notices
    fixed = {name for each in recording.fixed for name in of_fixed_length(checked.pipe, each)}
    for name in sorted(fixed & {request.component for request in checked.plan.compile}):
        notices.append(
            f"the engines of {name} are for prompts padded to a fixed length: they do not fit the blocks of a pipeline "
            'that is loaded with as_diffusers, which needs "on_incompatible": "eager" in "runtime"'
        )
    return recording


def _calibrate(
    checked: Checked, recording: Recording, metrics: Mapping[str, Metric], steps: Steps, writer: BundleWriter
) -> Checked:
    """The plan with the steps of schedules chosen, by the real pipeline; what was measured goes into the bundle."""
    for item in checked.placed:
        if not isinstance(item.step, Calibrate) or not recording.calls:
            continue
        component = item.step.component
        place = next(place for place in checked.placed if is_schedule(place, component))
        with steps(f"calibrate the schedule of {component}"), quiet_libraries():
            modules = {name: load_module(checked.source, name, checked.dtype) for name in checked.plan.modules}
            for name, module in modules.items():
                manager.apply(module, name, checked.placed)
            assert isinstance(place.step, CacheSchedule)
            with manager.guarded(item), row_scales():
                evidence = calibrated(recording, checked.pipe, modules, item.step, place.step, metrics)
        writer.write(f"calibration/{component}.json", as_json(evidence.as_json(item.step)), "doc")
        chosen = place.step.model_copy(update={"steps": tuple(int(step) for step in evidence.mask)})
        checked = checked.with_step(place, chosen)
    return checked


@contextmanager
def _collection_paused() -> Iterator[None]:
    """While it lasts, cyclic garbage is left alone.

    The ghosts and tokenizers are hundreds of thousands of objects that live, and Python looks through all of them again
    and again while they are made: a fifth of a check.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _spec_source(spec: Any) -> Any:
    return dict(spec) if isinstance(spec, Mapping) else Path(spec)


def _base(spec: Any, base: str | Path | None) -> Path:
    if base is not None:
        return Path(base)
    return Path(spec).expanduser().absolute().parent if isinstance(spec, (str, Path)) else Path()


__all__ = ["Built", "Checked", "check", "compile"]
