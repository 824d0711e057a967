"""The whole way from a spec to a bundle. It reads top to bottom as a spec goes:

    spec ─check─▶ plan ─model passes─▶ ─record─▶ program ─program passes─▶ ─exporters─▶ bundle

Nothing before the weights needs them: the pipeline that is checked, transformed and recorded is a *meta model*, whose
tensors have shapes and no data. Weights are then streamed through the same passes, a few blocks at a time.

Each stage takes a plan and returns a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffkiln.bundle import BundleWriter, write_receipt
from diffkiln.compiler.built import Built
from diffkiln.compiler.calibrate import Metric, calibrate
from diffkiln.compiler.check import SpecLike, check, collection_paused
from diffkiln.compiler.dry_run import dry_run
from diffkiln.compiler.memory import keep_large_tensors_apart
from diffkiln.compiler.packing import (
    EnginesPacker,
    manifest_of,
    pack_configuration,
    pack_licences,
    pack_programs,
    pack_report,
)
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Progress, Stages
from diffkiln.compiler.verify import Verification
from diffkiln.compiler.weights import stream_weights
from diffkiln.errors import RecordError
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.record.constants import Constants
from diffkiln.record.patches import of_fixed_length
from diffkiln.record.pipeline import Recording, record


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
    """Compiles a spec into a bundle. The output appears whole, at the end, or not at all.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        output: directory to make; one that exists is refused.
        force: replace a bundle that is there.
        base: folder that the source's relative path starts from; the spec file's by default.
        progress: called with the name of each stage when it begins.
        cache: of engines; the user's by default.
        metrics: what a `calibrate` may name besides psnr: functions of images [n, …] from 0 to 1 and their prompts.
        limits: as for `check`.

    Raises:
        SpecError, IllegalPlan: as `check`; also for an output that exists.
        BuildError: the build failed; its subclasses say where.
    """
    stages = Stages(progress)
    keep_large_tensors_apart()
    with applied(limits), BundleWriter(output, force) as writer:
        with stages("check"):
            plan = check(spec, base=base)
            writer.require_space(sum(plan.bytes_after.values()))
        with stages("record"), quiet_libraries(), collection_paused():
            plan = _recorded(plan)
        verification = Verification(plan.pipe, plan.recording)
        with stages("verify the recording"), quiet_libraries():
            verification.check_calls(plan.requests)
        plan = calibrate(plan, writer, metrics or {}, stages)
        with quiet_libraries():
            plan = _rewritten(plan)
        if any(target.device == "cuda" for target in plan.targets):
            with stages("run the call on fake GPU tensors"):
                dry_run(plan.recording, plan.spec.runtime.cuda_graphs)
        with stages("write the programs"):
            pack_configuration(writer, plan)
            pack_licences(writer, plan)
            plan = plan.packing(pack_programs(writer, plan))
        plan = _with_engines_and_weights(plan, writer, verification, cache or EngineCache(), stages)
        with stages("publish"):
            identity = writer.publish(
                lambda rows: manifest_of(rows, plan),
                lambda manifest: pack_report(writer, manifest, plan, stages.seconds),
            )
    write_receipt(identity)
    return Built(writer.output, identity, plan.notices, dict(stages.seconds))


def _recorded(plan: Plan) -> Plan:
    """Returns the plan with its call recorded, or with the reason why not if the bundle may run as diffusers."""
    try:
        recording = record(plan.pipe, plan.requests, Constants())
    except RecordError as error:
        if plan.spec.runtime.on_unrecordable != "diffusers":
            hint = 'To make a bundle that runs as diffusers, set "on_unrecordable": "diffusers" in "runtime".'
            raise type(error)(f"{plan.source.class_name} cannot be recorded: {error}. {hint}") from error
        told = ["no engines are built, since the call could not be recorded"] if plan.compiled else []
        return replace(plan, recording=Recording([], {}, Constants(), [], reason=str(error))).noting(told)
    manager.check_recording(recording, plan.listed, plan.targets)
    plan = replace(plan, recording=recording).noting(recording.notices)
    fixed = {name for each in recording.fixed for name in of_fixed_length(plan.pipe, each)}
    return plan.noting(
        f"the engines of {name} are for prompts padded to a fixed length: they do not fit the blocks of a pipeline "
        'that is loaded with as_diffusers, which needs "on_incompatible": "eager" in "runtime"'
        for name in sorted(fixed & plan.compiled)
    )


def _rewritten(plan: Plan) -> Plan:
    """Returns the plan with its programs as the passes leave them."""
    recording, notices = manager.rewrite(plan.recording, plan.listed)
    for item in plan.listed:
        notices += item.step.notices(recording, plan.compiled)
    return replace(plan, recording=recording).noting(notices)


def _with_engines_and_weights(
    plan: Plan, writer: BundleWriter, verification: Verification, cache: EngineCache, stages: Stages
) -> Plan:
    """Returns the plan with its engines built, and its weights written and verified."""
    engines = EnginesPacker(writer, cache, plan.recording, plan.state.modules)
    for request in plan.state.compile:
        if not request.holds_weights:
            with stages(f"compile the blocks of {request.component}"):
                plan = plan.packing(engines.component(request, plan.targets))
    held = frozenset(request.component for request in plan.state.compile if request.holds_weights)
    used = plan.recording.weight_types(held)
    for name in plan.state.modules:
        with stages(f"weights of {name}"):
            packed = stream_weights(plan, name, writer, engines, verification, frozenset(used.get(name, ())))
            plan = plan.packing(packed)
    return plan


__all__ = ["Built", "Plan", "check", "compile"]
