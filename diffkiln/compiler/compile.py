"""The whole way from a spec to a bundle. It reads top to bottom as a spec goes:

    spec ─check─▶ plan ─model passes─▶ ─record─▶ program ─program passes─▶ ─exporters─▶ bundle

Nothing before the weights needs them: the pipeline that is checked, transformed and recorded is a *meta model*, whose
tensors have shapes and no data. Weights are then streamed through the same passes, a few blocks at a time.

Each stage takes a plan and returns a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from diffkiln.bundle import BundleWriter, write_receipt
from diffkiln.bundle.manifest import PROCESSES
from diffkiln.compiler.built import Built
from diffkiln.compiler.calibrate import Metric, calibrate
from diffkiln.compiler.check import (
    SpecLike,
    base_of,
    check,
    check_with,
    checked,
    collection_paused,
    parsed_of,
)
from diffkiln.compiler.choosing import choices_of, measure, settled
from diffkiln.compiler.dry_run import dry_run
from diffkiln.compiler.fitting import fitted
from diffkiln.compiler.ledger import Ledger, Mode, ledger_of, with_bundle
from diffkiln.compiler.memory import keep_large_tensors_apart
from diffkiln.compiler.origin import remember_source
from diffkiln.compiler.packing import (
    EnginesPacker,
    Uses,
    manifest_of,
    pack_configuration,
    pack_constants,
    pack_licences,
    pack_programs,
    pack_report,
    uses_of,
)
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.planning import SharedCall, check_memory, planned_calls, shared_calls, working_of
from diffkiln.compiler.recover import recover
from diffkiln.compiler.stages import Progress, Stages
from diffkiln.compiler.trial import try_bundle
from diffkiln.compiler.verify import Verification
from diffkiln.compiler.weights import stream_weights
from diffkiln.compiler.working import Measured, measured_here
from diffkiln.errors import DataDependent, RecordError, VerifyError
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import Limits, applied
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.folder import IF_READ
from diffkiln.passes import manager
from diffkiln.program.planner import PlannedCall
from diffkiln.record.constants import Constants
from diffkiln.record.keywords import parameters_of
from diffkiln.record.patches import of_fixed_length
from diffkiln.record.pipeline import Recording, record
from diffkiln.record.refusals import Refused
from diffkiln.spec import Spec


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
    ledger: Mode = "cumulative",
) -> Built:
    """Compiles a spec into a bundle. The output appears whole, at the end, or not at all.

    Args:
        spec: a `Spec`, a path to its JSON, or the JSON as a dict.
        output: the directory to make. An existing one is refused.
        force: replace an existing bundle.
        base: the folder that the source's relative path starts from; by default the spec file's folder.
        progress: called with the name of each stage when it begins.
        cache: the cache of engines; by default the user's.
        metrics: metrics for `calibrate` and for gates of quality: functions of images [n, …] from 0 to 1 and their
            prompts.
        limits: as for `check`.
        ledger: with gates of quality, evaluate the passes one more each time, or "each" alone as well.

    Raises:
        SpecError, IllegalPlan: as `check`; also for an output that exists.
        BuildError: the build failed; the subclass says at which stage.
        QualityError: the bundle does not keep a gate of quality; names the pass that cost it.
    """
    stages, home, own = Stages(progress), base_of(spec, base), metrics or {}
    keep_large_tensors_apart()
    with applied(limits), BundleWriter(output, force) as writer:
        parsed, engines = parsed_of(spec), cache or EngineCache()

        def measured(one: Spec, folder: Path, timed: Callable[[Plan, Path], None]) -> None:
            with BundleWriter(folder) as beside:
                _compiled(one, beside, home, Stages(), engines, own, ledger, timed)

        choices = choices_of(parsed, lambda one: checked(one, home, own))
        parsed, fits = fitted(parsed, lambda one: _foreseen(settled(one, choices), home, own, stages))
        parsed, notices = measure(parsed, choices, measured, writer.output.parent, stages)
        built = _compiled(parsed, writer, home, stages, engines, own, ledger)
    return replace(built, notices=(*built.notices, *fits, *notices))


def _compiled(
    spec: Spec, writer: BundleWriter, home: Path, stages: Stages, cache: EngineCache,
    own: Mapping[str, Metric], ledger: Mode, timed: Callable[[Plan, Path], None] | None = None,
) -> Built:  # fmt: skip
    """Compiles a spec that leaves nothing to measurement. `timed` is given the complete bundle in the trial's stead."""
    with stages("check"):
        with collection_paused():
            plan = checked(spec, home, own)
        writer.require_space(sum(plan.bytes_after.values()))
    with stages("record"), quiet_libraries(), collection_paused():
        recorded = _recorded(plan)
    with stages("verify the recording"), quiet_libraries():
        plan, verification = _verified(plan, recorded)
    plan = recover(plan, stages)
    plan = calibrate(plan, writer, own, stages)
    rows = ledger_of(plan, home, own, ledger, stages)
    with quiet_libraries():
        plan = _rewritten(plan)
    check_memory(plan)
    if any(target.device == "cuda" for target in plan.targets):
        with stages("run the call on fake GPU tensors"):
            dry_run(plan.recording, plan.spec.runtime.cuda_graphs, plan.spec.parallel)
    with stages("write the programs"):
        pack_configuration(writer, plan)
        pack_licences(writer, plan)
        plan = plan.packing(pack_programs(writer, plan))
    plan = _with_engines_and_weights(plan, writer, verification, cache, stages)
    with stages("publish"):
        trial = _Trial(plan, rows, home, own, timed, stages)
        identity = writer.publish(
            lambda files: manifest_of(files, plan),
            lambda manifest: pack_report(
                writer, manifest, plan, stages.seconds, trial.ledger.as_json(), trial.working.rows
            ),
            trial,
        )
    if timed is None:
        write_receipt(identity)
        remember_source(identity, plan.spec.source, home, plan.spec.as_json()["passes"])
    return Built(writer.output, identity, (*plan.notices, *trial.working.notices), dict(stages.seconds))


@gated()
def plan_memory_of(
    spec: SpecLike,
    *,
    base: str | Path | None = None,
    max_memory: str | int | None = None,
    limits: Limits | None = None,
) -> dict[str, dict[str, PlannedCall]]:
    """Plans the memory of the calls that a spec's bundle would make. No weight is read, and nothing is built.

    Args:
        spec, base, limits: as for `compile`.
        max_memory: the most memory that a call may take for weights, constants and results, as bytes or such as
            "8GiB". By default what the spec says.

    Returns:
        The plan of each variant's programs, by the variant's name and the program's. Sizes are in bytes.

    Raises:
        SpecError, IllegalPlan: as `check`; also for what is no amount of memory, and a call that needs more.
        RecordError: the call cannot be recorded.
    """
    with applied(limits), quiet_libraries():
        parsed, home = parsed_of(spec), base_of(spec, base)
        choices = choices_of(parsed, lambda one: checked(one, home, ()))
        parsed, _ = fitted(settled(parsed, choices), lambda one: _foreseen(one, home, {}, Stages()))
        return planned_calls(_foreseen(parsed, home, {}, Stages()), max_memory)


@gated()
def shared_calls_of(
    spec: SpecLike, *, base: str | Path | None = None, limits: Limits | None = None
) -> dict[str, dict[str, SharedCall]]:
    """Records the calls that the processes of a spec's bundle run together. No weight is read, and nothing is built.

    Args:
        spec, base, limits: as for `compile`. The spec's target has `parallel`.

    Returns:
        By the variant's name and the program's: the call, of which can be asked what processes send each other, and
        the least time that it takes in one process and in several.

    Raises:
        SpecError, IllegalPlan: as `check`.
        RecordError: the call cannot be recorded.
        PassError: the call cannot be shared by processes; says why.
    """
    with applied(limits), quiet_libraries():
        with collection_paused():
            plan = _recorded(check_with(spec, base))
        own = tuple(item for item in plan.listed if PROCESSES not in item.step.features)
        return shared_calls(_rewritten(plan), _rewritten(replace(plan, listed=own)))


class _Trial:
    """The trial of a bundle that is complete: it adds the bundle's own row to the ledger, and measures memory."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        base: Path,
        own: Mapping[str, Metric],
        timed: Callable[[Plan, Path], None] | None,
        stages: Stages,
    ) -> None:
        self.ledger, self._plan, self._base, self._own, self._timed = ledger, plan, base, own, timed
        self._stages = stages
        self.working = Measured()

    def __call__(self, root: Path) -> None:
        """Tries the bundle in a directory."""
        if self._timed is not None:
            self._timed(self._plan, root)
            return
        try_bundle(root, self._plan)
        self.ledger = with_bundle(self.ledger, root, self._plan, self._base, self._own)
        self.working = measured_here(root, self._plan, self._stages)
        check_memory(self._plan, working_of(self._plan, self.working.rows))


def _foreseen(spec: Spec, home: Path, own: Mapping[str, Metric], stages: Stages) -> Plan:
    """Returns the plan of a spec that leaves nothing to measurement, its programs as the passes leave them."""
    with stages("plan the memory"), quiet_libraries(), collection_paused():
        return _rewritten(_recorded(checked(spec, home, own)))


def _recorded(plan: Plan) -> Plan:
    """Returns the plan with its call recorded, or with the reason why not if the bundle may run as diffusers."""
    try:
        recording = record(plan.pipe, plan.requests, Constants(), IF_READ)
    except RecordError as error:
        if plan.spec.runtime.on_unrecordable != "diffusers":
            if isinstance(error, Refused):  # as diffusers would, and so would a bundle that runs as diffusers
                raise
            hint = 'To make a bundle that runs as diffusers, set "on_unrecordable": "diffusers" in "runtime".'
            if isinstance(error, DataDependent) and _follows_prompts(plan):
                hint = (
                    f'If the prompt decides it, say how many tokens prompts have: "prompt_tokens" in "inputs". {hint}'
                )
            if keyword := _remembers(plan):
                hint = (
                    f'The call keeps what it computed for later steps: set "{keyword}" to false in inputs.call. {hint}'
                )
            raise type(error)(f"{plan.source.class_name} cannot be recorded: {error}. {hint}") from error
        return _as_diffusers(plan, str(error))
    manager.check_recording(recording, plan.listed, plan.targets)
    unread = {name for name in IF_READ if name in plan.source.components and name not in recording.read}
    source = plan.source.without(unread)
    plan = replace(plan, recording=recording, source=source).noting(source.notices[len(plan.source.notices) :])
    plan = plan.noting(recording.notices)
    fixed = {name for each in recording.fixed for name in of_fixed_length(plan.pipe, each)}
    return plan.noting(
        f"the engines of {name} are for prompts padded to a fixed length: they do not fit the blocks of a pipeline "
        'that is loaded with as_diffusers, which needs "on_incompatible": "eager" in "runtime"'
        for name in sorted(fixed & plan.compiled)
    )


def _follows_prompts(plan: Plan) -> bool:
    """Returns True if callers give prompts of any number of tokens."""
    request = plan.requests[0]
    return request.tokens is None and bool(request.prompts(parameters_of(plan.pipe), False))


def _remembers(plan: Plan) -> str:
    """Returns the keyword by which the call keeps keys and values from step to step, if it does; "" if not."""
    parameter = parameters_of(plan.pipe).get("use_kv_cache")
    kept = parameter is not None and plan.requests[0].fixed.get(parameter.name, parameter.default)
    return parameter.name if parameter is not None and kept else ""


def _as_diffusers(plan: Plan, reason: str) -> Plan:
    notices = ["no engines are built, since the call could not be recorded"] if plan.compiled else []
    return replace(plan, recording=Recording([], {}, Constants(), [], reason=reason)).noting(notices)


def _verified(plan: Plan, recorded: Plan) -> tuple[Plan, Verification]:
    """Returns the plan as it was recorded, if its programs give what the pipeline gives; else as `_recorded` does."""
    verification = Verification(recorded.pipe, recorded.recording)
    try:
        verification.check_calls(recorded.recording.requests)
    except VerifyError as error:
        if plan.spec.runtime.on_unrecordable != "diffusers":
            raise
        plan = _as_diffusers(plan, str(error))
        return plan, Verification(plan.pipe, plan.recording)
    return recorded, verification


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
    uses = uses_of(plan.recording, held)
    for name in plan.state.modules:
        with stages(f"weights of {name}"):
            packed = stream_weights(plan, name, writer, engines, verification, uses.get(name, Uses()))
            plan = plan.packing(packed)
    pack_constants(writer, plan.recording)
    return plan


__all__ = ["Built", "Plan", "check", "compile"]
